"""Digests of files: what cannot be read is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.common.file_digests import file_digests
from qrpo_core.common.hashing import digest_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for content in ("one", "two"):
        file.write_text(content)
        assert file_digests([file, file]) == [digest_file(file)] * 2


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_cannot_be_read_is_named(tmp_path: Path, make: object) -> None:
    """A folder and a dangling link stand for a file without permission, which root would read."""
    make(tmp_path / "weights")  # type: ignore[operator]
    with pytest.raises(DataError, match=r"the file cannot be read: .*\[.*weights\]: make it readable"):
        file_digests([tmp_path / "weights"])
