"""Rows of files and hub data sets, as mappings with their place.

JSON Lines (.jsonl, .ndjson, each also .gz) and Parquet are read through fsspec, so a path may be local or
s3://. Places are `path:line` (1-based, as editors count) for JSON Lines and `path row i` (0-based, as
tables count) for Parquet.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core import ids
from qrpo_core.config import PromptsConfig
from qrpo_core.data.messages import nearest
from qrpo_core.data.rows import check_columns
from qrpo_core.errors import DataError, QRPOError

#: The fields of a row, or why it cannot be read; and its place.
RawRow = tuple[dict[str, Any] | DataError, str]

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET = (".parquet",)
_BATCH = 4096


def read_file(
    config: PromptsConfig, storage_options: dict[str, Any] | None, notes: Counter[str]
) -> Iterator[RawRow]:
    """Rows of `config.path` in file order. Blank lines are skipped and counted in `notes`.

    A row that is not a JSON object is given as the DataError that says so (with its line number). Raises
    DataError for a file that is missing, not readable or of an unknown format.
    """
    path = config.path or ""
    if path.endswith(_LINES):
        rows = _read_lines(path, storage_options, notes)
    elif path.endswith(_PARQUET):
        rows = _read_parquet(path, config, storage_options)
    else:
        raise DataError(
            f"unknown format of {path!r}",
            where="prompts.path",
            remedy=f"name it {', '.join((*_LINES, *_PARQUET))}",
        )
    try:
        yield from rows
    except QRPOError:
        raise
    except Exception as error:  # fsspec back ends raise families of their own
        raise _unreadable(path, error) from error


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
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith((*_LINES, *_PARQUET))]
    return nearest(Path(path).name, names) if names else "give the path of a file that exists"


def _read_lines(path: str, storage_options: dict[str, Any] | None, notes: Counter[str]) -> Iterator[RawRow]:
    import fsspec

    fs, inner, _ = _locate(path, storage_options)
    with fsspec.core.OpenFile(fs, inner, "rb", compression="gzip" if path.endswith(".gz") else None) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                notes["blank_lines"] += 1
                continue
            place = f"{path}:{number}"
            try:
                row: dict[str, Any] | DataError = _parse_line(line, place)
            except DataError as error:
                row = error
            yield row, place


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"the row is not UTF-8 at byte {error.start}", where=place, remedy="save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"the row is not JSON: {error.msg} at column {error.colno}",
            where=place,
            remedy="one JSON object a line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the row is not readable: {error}", where=place, remedy="one JSON object a line"
        ) from None
    if not isinstance(row, dict):
        raise DataError("the row is not an object", where=place, remedy='write {"prompt": ...} on every line')
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return value


#: Made once: json.loads would make one for every row.
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _read_parquet(
    path: str, config: PromptsConfig, storage_options: dict[str, Any] | None
) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, inner, _ = _locate(path, storage_options)
    with fs.open(inner, "rb") as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"not a Parquet file: {error}", where=path, remedy="check that it is whole"
            ) from None
        columns = check_columns(file.schema_arrow.names, config, path)
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            for row in batch.to_pylist():
                yield row, f"{path} row {number}"
                number += 1
