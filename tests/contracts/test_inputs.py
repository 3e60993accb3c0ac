"""Files that travel through the store by their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.store import inputs
from qrpo_core.store.backends.interface import Objects


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))


def test_what_is_put_is_fetched_by_its_address(objects: Objects, tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    files = {"a.py": tmp_path / "a.py", "pkg/b.py": tmp_path / "b.py"}
    address = inputs.put(objects, files)
    for name, path in files.items():
        assert inputs.fetch(objects, f"{address}/{name}").read_bytes() == path.read_bytes()
    # Modules find each other: they lie in one folder.
    a, b = (inputs.fetch(objects, f"{address}/{name}") for name in files)
    assert b.parent.parent == a.parent


def test_the_address_is_that_of_names_and_contents_alone(objects: Objects, tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_text("same")
    second.write_text("same")
    address = inputs.put(objects, {"rows": first})
    stored = list(objects.keys("inputs/"))
    assert inputs.put(objects, {"rows": second}) == address
    assert list(objects.keys("inputs/")) == stored
    second.write_text("other")
    assert inputs.put(objects, {"rows": second}) != address
    assert inputs.put(objects, {"lines": first}) != address


def test_a_file_that_is_not_there_is_missing(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "1").write_text("same")
    address = inputs.put(objects, {"rows": tmp_path / "1"})
    for wrong in (f"{address}/other", address, "store:inputs/0/rows", "store:", "store:inputs/"):
        with pytest.raises(MissingError, match=r"no such input.*store of the submission"):
            inputs.fetch(objects, wrong)


def test_a_damaged_file_is_found_and_put_again(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "1").write_text("right")
    address = inputs.put(objects, {"rows": tmp_path / "1"})
    key = f"{address.removeprefix(inputs.SCHEME)}/rows"
    objects.write(key, b"wrong")
    with pytest.raises(DamagedError, match="submit the experiment again"):
        inputs.fetch(objects, f"{address}/rows")
    assert inputs.put(objects, {"rows": tmp_path / "1"}) == address
    assert objects.read(key) == b"right"
    assert inputs.fetch(objects, f"{address}/rows").read_text() == "right"
