"""A directory that is written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qrpo_core.common.errors import QRPOError


def refuse_existing(out: Path, where: str) -> None:
    """Raise QRPOError if there is something at `out`. where : the option that named it."""
    if out.exists():
        raise QRPOError(f"{out} exists already", where=where, remedy="name a new directory, or remove it")


@contextmanager
def new_directory(out: Path, where: str) -> Iterator[Path]:
    """A scratch directory that becomes `out` when it leaves without an error, and is removed otherwise.

    where : the option that named `out`. Raises QRPOError if `out` exists or cannot be written.
    """
    refuse_existing(out, where)
    scratch: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)
    except OSError as error:
        raise QRPOError(f"{out} cannot be written: {error.strerror}", where=where) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
