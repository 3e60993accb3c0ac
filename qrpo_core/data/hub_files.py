"""The files of each split of a data set, if they are plain files of JSON, CSV or Parquet.

For a hub data set the list is stored beside its copy in the hub's cache, by commit. An offline run needs it
to know whether all files are there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.files import Format, Source

#: Options of the library's builders that do not change how this module reads a file, or that it reads too.
_KNOWN_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}
_READ_OPTIONS = {"sep", "delimiter", "field"}


#: Archives, which are not opened.
_PACKED = re.compile(r"\.(?:tar\.\w+|tar|tgz|zip|zst|lz4|7z|rar)$")


@dataclass(frozen=True)
class Files:
    """The files of a data set.

    format : format of all files.
    splits : by split, the addresses of its files for fsspec.
    delimiter, key : see `files.Source`.
    """

    format: Format
    splits: dict[str, list[str]]
    delimiter: str = ","
    key: str | None = None

    def sources(self, split: str, config: PromptsConfig, commit: str | None) -> list[Source]:
        """Return the files of a split, after their download unless the split is streamed."""
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
    """Return the files of a data set whose splits `datasets` has found; None if the library must read them.

    Raises DataError if the card of the data set sets a reading option that is not supported.
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
    """Store the files of a commit in the hub's cache. None means that the library reads them."""
    record = _record(config, commit)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(files and dataclasses.asdict(files)))


def recall(config: PromptsConfig, commit: str) -> tuple[bool, Files | None]:
    """Return whether `remember` has stored a commit, and what it has stored.

    Raises DataError for an unknown commit in offline mode: the library's own copies do not list the files.
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
    """Return the error for a commit that was never read, in offline mode."""
    return DataError(
        f"no copy of data set {config.name!r} at {commit} in the cache",
        where="prompts.revision",
        remedy="load it once with the hub in reach, or set prompts.revision to a commit that was loaded",
    )


def _record(config: PromptsConfig, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=config.name or "", repo_type="dataset")
    return folder / "qrpo" / commit / f"{hashing.digest_json(config.subset)}.json"


def _inside(address: str, config: PromptsConfig, commit: str | None) -> str | None:
    """Return the path of a file inside its data set; None for a file elsewhere."""
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
