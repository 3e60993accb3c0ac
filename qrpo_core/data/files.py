"""Rows of files with their places. Files are local or remote (s3://, hf://), through fsspec.

The formats are JSON Lines and JSON arrays (.jsonl, .ndjson, .json), CSV (.csv, .tsv), each also .gz, .bz2 or
.xz, and Parquet. Data sets of kind hub that consist of such files are read in the same way.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError, QRPOError
from qrpo_core.common.extras import require
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.arrow_rows import read_parquet
from qrpo_core.data.fields import nearest
from qrpo_core.data.text_rows import RawRow, read_csv, read_json

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

    address : its address for fsspec. shown : its name in messages.
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
    """Yield the rows of `config.path` in file order. Blank lines are skipped and counted in `notes`.

    A row that is not a JSON object is yielded as a DataError with its line number. Raises DataError for a
    file that is missing, unreadable or of an unknown format.
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
    """Yield the rows of one file, like `read_file`."""
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
    """Return the sha256 of a local file, or of a remote one after its download to a temporary file."""
    try:
        fs, inner, local = _locate(path, storage_options)
        if local:
            return hashing.digest_file(inner)
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "source")
            fs.get_file(inner, copy)
            return hashing.digest_file(copy)
    except QRPOError:
        raise
    except Exception as error:  # fsspec back ends raise families of their own
        raise _unreadable(path, error) from error


def _locate(path: str, storage_options: dict[str, Any] | None) -> tuple[Any, str, bool]:
    """Return (file system, path in it, whether it is this machine's disk)."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if path.startswith("s3://"):
        require("s3fs", f"reading {path!r}", where="prompts.path")
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
