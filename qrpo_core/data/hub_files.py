"""Which files make the splits of a data set, for those that are plain files of JSON, CSV or Parquet.

Of a hub data set the answer is kept beside its copy in the hub's cache, by commit: without the hub in reach
nobody else could tell whether the files that are there are all.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qrpo_core import ids
from qrpo_core.data.config import PromptsConfig
from qrpo_core.data.readers import Format, Source
from qrpo_core.errors import DataError

#: Options of the library's builders that do not change how a file is read here, or are read here too.
_KNOWN_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}
_READ_OPTIONS = {"sep", "delimiter", "field"}


#: Packings that the readers do not open.
_PACKED = re.compile(r"\.(?:tar\.\w+|tar|tgz|zip|zst|lz4|7z|rar)$")


@dataclass(frozen=True)
class Files:
    """The files of a data set.

    format : of all of them. splits : of every split its files, as addresses for fsspec. delimiter, key : see
    `readers.Source`.
    """

    format: Format
    splits: dict[str, list[str]]
    delimiter: str = ","
    key: str | None = None

    def sources(self, split: str, config: PromptsConfig, commit: str | None) -> list[Source]:
        """The files of a split as they are to be read: downloaded ones unless the split is streamed."""
        found = []
        for address in self.splits[split]:
            inner = _inside(address, config, commit)
            where = address
            if commit is not None and inner is not None and not config.streaming:
                where = _download(config.name or "", inner, commit)
            shown = address if inner is None else f"{config.name}/{inner}"
            found.append(Source(where, shown, self.format, self.delimiter, self.key))
        return found


def sources_of(config: PromptsConfig, builder: Any) -> Files | None:
    """The files of a data set whose splits `datasets` has found; None where it must read them itself.

    Raises DataError where the data set's card asks for a way of reading that is not known here.
    """
    if builder.name not in get_args(Format):
        return None
    asked = builder.config
    plain = type(asked)()
    odd = [
        field.name
        for field in dataclasses.fields(asked)
        if field.name not in _KNOWN_OPTIONS | _READ_OPTIONS
        and getattr(asked, field.name) != getattr(plain, field.name)
    ]
    if odd:
        raise DataError(
            f"the card of data set {config.name!r} sets {', '.join(odd)} for its {builder.name} files",
            where="prompts.name",
            remedy="save the rows as JSON Lines or Parquet (kind 'file')",
        )
    packed = sorted({suffix for files in asked.data_files.values() for suffix in _odd_endings(files)})
    if packed:
        raise DataError(
            f"files of data set {config.name!r} are packed as {', '.join(packed)}",
            where="prompts.name",
            remedy="unpack them; .gz, .bz2 and .xz of one file are read",
        )
    splits = {str(split): [str(file) for file in files] for split, files in asked.data_files.items()}
    return Files(builder.name, splits, getattr(asked, "sep", ","), getattr(asked, "field", None))


def _odd_endings(files: Iterable[Any]) -> Iterator[str]:
    for file in files:
        packed = _PACKED.search(str(file))
        if packed:
            yield packed[0]


def remember(config: PromptsConfig, commit: str, files: Files | None) -> None:
    """Keep beside the copy in the hub's cache which files a commit has; None: the library reads them."""
    record = _record(config, commit)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(files and dataclasses.asdict(files)))


def recall(config: PromptsConfig, commit: str) -> tuple[bool, Files | None]:
    """Whether a commit is remembered, and what is.

    Raises DataError where it is not and the hub is not to be asked: copies of the library alone do not say
    what the files held.
    """
    from huggingface_hub import is_offline_mode

    record = _record(config, commit)
    if record.is_file():
        found = json.loads(record.read_text())
        return True, found and Files(**found)
    if is_offline_mode():
        raise unknown_copy(config, commit)
    return False, None


def unknown_copy(config: PromptsConfig, commit: str) -> DataError:
    """The error where the hub cannot be asked about a commit that was not read before."""
    return DataError(
        f"no copy of data set {config.name!r} at {commit} in the cache",
        where="prompts.revision",
        remedy="load it once with the hub in reach, or set prompts.revision to a commit that was loaded",
    )


def _record(config: PromptsConfig, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=config.name or "", repo_type="dataset")
    return folder / "qrpo" / commit / f"{ids.digest_json(config.subset)}.json"


def _inside(address: str, config: PromptsConfig, commit: str | None) -> str | None:
    """The path of a file inside its data set; None for one that lies elsewhere."""
    if commit is not None:
        beginning = f"hf://datasets/{config.name}@{commit}/"
        return address.removeprefix(beginning) if address.startswith(beginning) else None
    folder = Path(config.name or "").resolve()
    path = Path(address).resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def _download(name: str, file: str, commit: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, file, repo_type="dataset", revision=commit)
    except Exception as error:  # the client raises families of its own
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"cannot download {file!r} of data set {name!r}: {type(error).__name__}: {text}",
            where="prompts.name",
            remedy="try again with the hub in reach",
        ) from error
