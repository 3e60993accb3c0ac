"""Rows of Hugging Face data sets, from the hub or from a local directory.

The library `datasets` finds the files of a split (by their names and the card's configurations). Files of
JSON, CSV and Parquet are then read like those of kind file: the library would turn integers beyond 64 bits
into floats, texts into dates and zero-padded texts into numbers. The library reads all other files itself.

A hub data set is pinned to a commit before it is read, and a copy in the cache serves that commit alone. A
local directory is read through a temporary cache, so that a changed file is never served stale.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.arrow_rows import table_rows
from qrpo_core.data.files import RawRow, read_source
from qrpo_core.data.hub_files import Files, recall, remember, sources_of, unknown_copy
from qrpo_core.data.rows import check_columns

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BATCH = 1000


def hub_identity(config: PromptsConfig) -> dict[str, Any]:
    """Return {"commit": ...} of a hub data set, or {"files": {path: sha256}} of a local directory.

    It loads neither `datasets` nor the rows. One request to the hub resolves a branch or a tag; a
    40-digit commit needs none, and with HF_HUB_OFFLINE=1 the local cache answers.
    """
    name = config.name or ""
    if os.path.isdir(name):
        return {"files": _directory_digests(Path(name), config)}
    return {"commit": _resolve(name, config.revision)}


def read_hub(config: PromptsConfig, notes: Counter[str]) -> Iterator[RawRow]:
    """Yield the rows of one split in order, with places `name/file:line` or `name[split] row i` (from 0).

    Raises DataError for an unknown data set, revision or split, and for a missing column.
    """
    commit = hub_identity(config).get("commit")
    known, files = (False, None) if commit is None else recall(config, commit)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        builder = None
        if files is None:
            builder = _builder(config, commit, None if commit else folder)
            if commit is not None and (builder.hash != commit or (builder.name == "cache" and not known)):
                raise unknown_copy(config, commit)
            files = None if known else sources_of(config, builder)
            if commit is not None:
                remember(config, commit, files)
        if commit is not None and commit != config.revision:
            # The library does not record the branch of a commit, and offline runs need it.
            ref = _ref(config.name or "", config.revision)
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
        if files is not None:
            yield from _from_files(config, files, commit, notes)
        else:
            yield from _from_library(config, builder)


def _from_files(
    config: PromptsConfig, files: Files, commit: str | None, notes: Counter[str]
) -> Iterator[RawRow]:
    """Yield the rows of a split, or of slices and sums of splits (`train[:10%]+test`)."""
    import datasets

    def rows(split: str, notes: Counter[str]) -> Iterator[RawRow]:
        for source in files.sources(split, config, commit):
            yield from read_source(source, config, None, notes)

    if config.split in files.splits:
        yield from rows(config.split, notes)
        return
    names = {re.split(r"[\[]", part)[0].strip() for part in config.split.split("+")}
    if not names <= files.splits.keys():
        raise _no_split(config, files.splits)
    lengths = {name: sum(1 for _ in rows(name, Counter())) for name in names}
    try:
        parts = datasets.ReadInstruction.from_spec(config.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"prompts.split {config.split!r} is not readable: {error}",
            where="prompts.split",
            remedy="write it as train, train[:100], train[10%:50%] or train+test",
        ) from None
    for part in parts:
        yield from islice(rows(part.splitname, notes), part.from_, part.to)


def _from_library(config: PromptsConfig, builder: Any) -> Iterator[RawRow]:
    dataset = _open(config, builder)
    where = f"{config.name}[{config.split}]"
    # A stream may not know its columns before its first row.
    known = dataset.column_names or list(next(iter(dataset), {}))
    columns = check_columns(known, config, where)
    number = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH):
        for row in table_rows(batch):
            yield row, f"{where} row {number}"
            number += 1


def _builder(config: PromptsConfig, commit: str | None, cache: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(
            config.name or "", config.subset, revision=commit, cache_dir=cache
        )
    except Exception as error:  # the library raises families of its own and of the hub's client
        raise _cannot_load(config, error) from error


def _open(config: PromptsConfig, builder: Any) -> Any:
    """Return the split as the library reads it."""
    try:
        if config.streaming:
            known = [str(split) for split in builder.as_streaming_dataset()]
        else:
            builder.download_and_prepare()
            known = [str(split) for split in builder.info.splits or {}]
        if re.split(r"[\[+]", config.split)[0] not in known:
            raise _no_split(config, known)
        open_split = builder.as_streaming_dataset if config.streaming else builder.as_dataset
        return open_split(split=config.split)
    except DataError:
        raise
    except Exception as error:  # the library raises families of its own and of the hub's client
        raise _cannot_load(config, error) from error


def _no_split(config: PromptsConfig, known: Iterable[str]) -> DataError:
    return DataError(
        f"data set {config.name!r} has no split {config.split!r}",
        where="prompts.split",
        remedy=f"it has {', '.join(known)}",
    )


def _cannot_load(config: PromptsConfig, error: Exception) -> DataError:
    return DataError(
        f"cannot load data set {config.name!r}: {_brief(error)}",
        where="prompts.name",
        remedy="check name, revision and connection, or save the rows as JSONL or Parquet (kind 'file')",
    )


def _resolve(name: str, revision: str | None) -> str:
    """Return the commit of a revision (default: main) of a hub data set."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if is_offline_mode():
        ref = _ref(name, revision)
        if ref.is_file():
            return ref.read_text().strip()
        raise DataError(
            f"no data set directory {name!r}, and HF_HUB_OFFLINE is set with no copy of it in the cache",
            where="prompts.name",
            remedy="give a directory that exists, or load it once with the hub in reach",
        )
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except RevisionNotFoundError:
        raise DataError(
            f"data set {name!r} has no revision {revision!r}",
            where="prompts.revision",
            remedy="give a branch, a tag or a commit",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DataError(
            f"no data set {name!r}, neither as a directory nor on the hub",
            where="prompts.name",
            remedy="check the name; a private data set needs HF_TOKEN",
        ) from None
    except Exception as error:  # network errors of the client's transport
        raise DataError(
            f"the hub cannot be asked for data set {name!r}: {_brief(error)}",
            where="prompts.name",
            remedy="try again, or set HF_HUB_OFFLINE=1 to use the copy in the cache",
        ) from error
    if commit is None:
        raise DataError(f"the hub names no commit of data set {name!r}", where="prompts.name")
    return commit


def _ref(name: str, revision: str | None) -> Path:
    """Return the file in which the hub's cache keeps the commit of a branch or tag."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE) / folder / "refs" / (revision or "main")


def _directory_digests(folder: Path, config: PromptsConfig) -> dict[str, str]:
    if config.revision is not None:
        raise DataError(
            f"revision {config.revision!r} of a local directory",
            where="prompts.revision",
            remedy="remove it; the files themselves are the revision",
        )
    digests = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        # Hidden folders and files hold no rows, but .huggingface.yaml says which files do.
        hidden = any(part.startswith(".") for part in parts) and parts != (".huggingface.yaml",)
        if path.is_file() and not hidden:
            digests["/".join(parts)] = hashing.digest_file(path)
    if not digests:
        raise DataError(
            f"no files in {str(folder)!r}", where="prompts.name", remedy="put JSONL or Parquet there"
        )
    return digests


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn the library's progress bars off inside the block: the caller shows its own."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _brief(error: BaseException) -> str:
    """Return one line about the first error of a chain: the errors on top of it say less."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
