"""Rows of Arrow tables and Parquet files as plain values that JSON knows.

float32 and float16 become their shortest spelling (0.1, not 0.10000000149011612). A decimal becomes a number
if that keeps every digit, else text. Dates and times become ISO text. Cells of Arrow's JSON type are parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.data.rows import check_columns
from qrpo_core.data.text_rows import decode_json

_BATCH = 4096

Read = Callable[[Any], Any]


def read_parquet(stream: Any, shown: str, config: PromptsConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a Parquet file with their places, `shown row i` (counted from 0)."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"not a Parquet file: {error}", where=shown, remedy="check that it is whole"
        ) from None
    columns = check_columns(file.schema_arrow.names, config, shown)
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
        for row in table_rows(batch):
            yield row, f"{shown} row {number}"
            number += 1


def table_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a table as mappings of plain values."""
    columns = []
    for name in table.schema.names:
        column = table.column(name)
        read = _reader(column.type)
        values = column.to_pylist()
        columns.append([_unless_null(read, value) for value in values] if read else values)
    return [dict(zip(table.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _reader(kind: pa.DataType) -> Read | None:
    """Return the conversion from pyarrow's value to a plain value; None if none is needed."""
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        import numpy as np

        short = np.float32 if pa.types.is_float32(kind) else np.float16
        return lambda value: float(str(short(value)))
    if pa.types.is_decimal(kind):
        return _decimal
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        return lambda value: value.isoformat()
    if isinstance(kind, pa.JsonType):
        return decode_json
    if isinstance(kind, pa.BaseExtensionType):
        return _reader(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _reader(kind.value_type)
    if pa.types.is_struct(kind):
        return _struct_reader(kind)
    if pa.types.is_map(kind):
        key, item = _reader(kind.key_type), _reader(kind.item_type)
        if not key and not item:
            return None
        return lambda value: [(_unless_null(key, k), _unless_null(item, v)) for k, v in value]
    if pa.types.is_nested(kind) and kind.num_fields == 1:  # the kinds of lists
        inner = _reader(kind.value_type)
        return (lambda value: [_unless_null(inner, one) for one in value]) if inner else None
    return None


def _struct_reader(kind: pa.StructType) -> Read | None:
    inner = {part.name: read for part in kind if (read := _reader(part.type))}
    if not inner:
        return None
    return lambda value: {name: _unless_null(inner.get(name), one) for name, one in value.items()}


def _unless_null(read: Read | None, value: Any) -> Any:
    return value if value is None or read is None else read(value)


def _decimal(value: Decimal) -> int | float | str:
    if value == value.to_integral_value():
        return int(value)
    number = float(value)
    return number if Decimal(repr(number)) == value else str(value)
