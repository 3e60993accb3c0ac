"""Rows of files, as mappings with their place. Local or remote (s3://, hf://), by fsspec.

JSON Lines and JSON arrays (.jsonl, .ndjson, .json), CSV (.csv, .tsv), each also .gz, .bz2 or .xz, and
Parquet. The data sets of kind hub go through the same readers where they are such files.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qrpo_core import ids
from qrpo_core.data.arrow_rows import read_parquet
from qrpo_core.data.config import PromptsConfig
from qrpo_core.data.fields import nearest
from qrpo_core.data.text_rows import RawRow, read_csv, read_json
from qrpo_core.errors import DataError, QRPOError

__all__ = ["RawRow", "Source", "file_digest", "read_file", "read_source"]

Format = Literal["json", "csv", "parquet"]

_FORMATS: dict[str, tuple[Format, str]] = {
    ".jsonl": ("json", ""),
    ".ndjson": ("json", ""),
    ".json": ("json", ""),
    ".csv": ("csv", ","),
    ".tsv": ("csv", "\t"),
    ".parquet": ("parquet", ""),
}
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True)
class Source:
    """One file of rows.

    address : where it lies, for fsspec. shown : how places call it. format : what it is.
    delimiter : of CSV. key : of JSON, the field of one object that holds the rows.
    """

    address: str
    shown: str
    format: Format
    delimiter: str = ","
    key: str | None = None


def read_file(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str]
) -> Iterator[RawRow]:
    """Rows of `config.path` in file order. Blank lines are skipped and counted in `notes`.

    A row that is not a JSON object is given as the DataError that says so (with its line number). Raises
    DataError for a file that is missing, not readable or of an unknown format.
    """
    path = config.path or ""
    ending = Path(path.removesuffix(_packed(path))).suffix
    if ending not in _FORMATS or (ending == ".parquet" and _packed(path)):
        raise DataError(
            f"unknown format of {path!r}",
            where="prompts.path",
            remedy=f"name it {', '.join(_FORMATS)}; texts also with {', '.join(_PACKED)}",
        )
    form, delimiter = _FORMATS[ending]
    yield from read_source(Source(path, path, form, delimiter), config, storage_options, notes)


def read_source(
    source: Source, config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str]
) -> Iterator[RawRow]:
    """Rows of one file, as `read_file` gives them."""
    import fsspec

    address = source.address
    try:
        fs, inner, _ = _locate(address, storage_options)
        with fsspec.core.OpenFile(fs, inner, "rb", compression=_PACKED.get(_packed(address))) as stream:
            if source.format == "json":
                yield from read_json(stream, source.shown, notes, source.key)
            elif source.format == "csv":
                yield from read_csv(stream, source.shown, config, source.delimiter)
            else:
                yield from read_parquet(stream, source.shown, config)
    except QRPOError:
        raise
    except Exception as error:  # fsspec back ends raise families of their own
        raise _unreadable(source.shown, error) from error


def _packed(path: str) -> str:
    return next((ending for ending in _PACKED if path.endswith(ending)), "")


def file_digest(path: str, storage_options: dict[str, Any] | None) -> str:
    """sha256 of a file's bytes, local or remote (fetched into a temporary file)."""
    try:
        fs, inner, local = _locate(path, storage_options)
        if local:
            return ids.digest_file(inner)
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "source")
            fs.get_file(inner, copy)
            return ids.digest_file(copy)
    except Exception as error:  # fsspec back ends raise families of their own
        raise _unreadable(path, error) from error


def _locate(path: str, storage_options: dict[str, Any] | None) -> tuple[Any, str, bool]:
    """(file system, path inside it, whether it is this machine's disk)."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    # The options are the store's and belong to object storage; local paths take none.
    options = (storage_options or {}) if "://" in path else {}
    fs, inner = fsspec.core.url_to_fs(path, **options)
    return fs, inner, isinstance(fs, LocalFileSystem)


def _unreadable(path: str, error: Exception) -> DataError:
    where = "prompts.path"
    if isinstance(error, FileNotFoundError):
        return DataError(f"no file {path!r}", where=where, remedy=_siblings(path))
    if isinstance(error, PermissionError):
        return DataError(f"not allowed to read {path!r}", where=where, remedy="check rights or credentials")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path!r} is a directory", where=where, remedy="give one file, or use kind 'hub'")
    return DataError(
        f"cannot read {path!r}: {type(error).__name__}: {error}",
        where=where,
        remedy="check that the file is whole and the place can be reached",
    )


def _siblings(path: str) -> str:
    folder = Path(path).parent
    if "://" in path or not folder.is_dir():
        return "give the path of a file that exists"
    endings = (*_FORMATS, *_PACKED)
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(endings)]
    return nearest(Path(path).name, names) if names else "give the path of a file that exists"
