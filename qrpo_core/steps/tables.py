"""Tables in and out of artifacts."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from qrpo_core.records import check_table
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.tables import from_parquet


def to_bytes(table: pa.Table, schema: pa.Schema, where: str) -> bytes:
    """A table, checked against its schema, as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(check_table(table, schema, where).combine_chunks(), buffer, compression="zstd")
    return buffer.getvalue()


def load(workspace: Workspace, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
    """One table of an artifact; content and schema are checked."""
    data = workspace.artifacts.read(manifest, name)
    return check_table(from_parquet(data), schema, manifest.path(name))
