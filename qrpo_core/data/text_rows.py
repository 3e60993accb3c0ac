"""Rows of text files: JSON Lines, one JSON array, CSV.

An unreadable row is yielded as a DataError, and reading goes on if it can. Whole numbers of JSON keep all
their digits. Cells of CSV are text; an empty cell is null.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.fields import kind
from qrpo_core.data.rows import check_columns

#: (the fields of a row or the error of an unreadable one, its place)
RawRow = tuple[dict[str, Any] | DataError, str]

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(stream: Any, shown: str, notes: Counter[str], key: str | None = None) -> Iterator[RawRow]:
    """Yield the rows of JSON Lines, or of one array of objects if the file begins with a bracket.

    Places are `shown:line` (from 1), for an array with the number of the item (from 0). Blank lines are
    counted in `notes`.
    key : the field that holds the array, in a file of one object.
    """
    if key is not None:
        yield from _items_under(key, stream.read(), shown)
        return
    begun = False
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError("the file is UTF-16", where=f"{shown}:1", remedy="save it as UTF-8")
        if line.isspace() or not line:
            notes["blank_lines"] += 1
            continue
        if not begun and line.lstrip().startswith(b"["):
            yield from _array(line + stream.read(), shown, number)
            return
        if not begun and line.strip() == b"{":
            raise DataError(
                "the file begins with an object over several lines",
                where=f"{shown}:{number}",
                remedy="write one object a line, or one array of all rows",
            )
        begun = True
        place = f"{shown}:{number}"
        yield _parse_line(line, place), place


def read_csv(stream: Any, shown: str, config: PromptsConfig, delimiter: str) -> Iterator[RawRow]:
    """Yield the rows of a table with a header. Places are `shown:line`, the first line of the row.

    Raises DataError for a missing or doubled column and for a file that is not UTF-8.
    """
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            twice = next(name for name, count in Counter(header).items() if count > 1)
            raise DataError(f"column {twice!r} stands twice", where=shown, remedy="rename one of the two")
        if header:
            check_columns(header, config, shown)
        line = rows.line_num + 1
        for cells in rows:
            place, line = f"{shown}:{line}", rows.line_num + 1
            if not cells:
                continue
            yield _cells(header, cells, place), place
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 after line {rows.line_num}: {error.reason}", where=shown, remedy="save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"not CSV: {error}", where=f"{shown}:{rows.line_num}", remedy="check its quotes and delimiters"
        ) from None


def decode_json(text: str) -> Any:
    """Return a JSON value. Raises ValueError for other text and for a key that an object has twice."""
    return _DECODER.decode(text)


def _cells(header: list[str], cells: list[str], place: str) -> dict[str, Any] | DataError:
    if len(cells) != len(header):
        return DataError(
            f"the row has {len(cells)} cells, the header {len(header)}",
            where=place,
            remedy="quote cells that hold the delimiter",
        )
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parse_line(line: bytes, place: str) -> dict[str, Any] | DataError:
    try:
        row = decode_json(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return DataError(
            f"the row is not UTF-8 at byte {error.start}", where=place, remedy="save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return DataError(
            f"the row is not JSON: {error.msg} at column {error.colno}",
            where=place,
            remedy="one JSON object a line, or one array of all rows",
        )
    except (ValueError, RecursionError) as error:
        return DataError(f"the row is not readable: {error}", where=place, remedy="one JSON object a line")
    return _object(row, place)


def _object(row: Any, place: str) -> dict[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    return DataError(f"the row is {kind(row)}, not an object", where=place, remedy='a row is {"prompt": ...}')


def _array(data: bytes, shown: str, line: int) -> Iterator[RawRow]:
    """Yield the items of a file that is one array, each with its first line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", where=shown, remedy="save it as UTF-8") from None
    begin = text.index("[")
    at, number = _skip(text, begin + 1), 0
    ended = text[at : at + 1] == "]"
    while not ended:
        line += text.count("\n", begin, at)
        begin, place = at, f"{shown}:{line} item {number}"
        try:
            row, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise _broken(f"the item is not JSON: {problem}", place) from None
        yield _object(row, place), place
        at, number = _skip(text, at), number + 1
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            raise _broken("the array goes on without a comma, or is cut", place)
        at = at if ended else _skip(text, at + 1)
    if _skip(text, at + 1) < len(text):
        raise _broken("the file goes on behind the array", f"{shown}:{line}")


def _broken(problem: str, place: str) -> DataError:
    return DataError(problem, where=place, remedy="the file must be one JSON array of objects, or JSON Lines")


def _items_under(key: str, data: bytes, shown: str) -> Iterator[RawRow]:
    try:
        items = decode_json(data.decode("utf-8-sig"))[key]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read field {key!r}: {type(error).__name__}: {error}",
            where=shown,
            remedy="the data set's card names it; save the rows as JSON Lines",
        ) from None
    for number, item in enumerate(items):
        place = f"{shown} item {number} of {key!r}"
        yield _object(item, place), place


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return value


#: Made once: json.loads would make one for every row.
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
