"""The cache directory stays within its limit, and takes nothing away from who reads it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.local_copies import hold, limit, make_room, use

MEGABYTE = 10**6


class Owner:
    pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QRPO_CACHE_GB", "0.003")
    return tmp_path / "cache"


def copy(cache: Path, name: str, *, hours_ago: float, size: int = MEGABYTE) -> Path:
    """A copy that was last asked for so long ago."""
    entry = cache / name
    entry.mkdir(parents=True)
    file = entry / "weights"
    file.write_bytes(b"\0" * size)
    use(entry)
    then = time.time() - 3600 * hours_ago
    for path in (file, entry.with_name(f"{entry.name}.used")):
        os.utime(path, (then, then))
    return entry


def test_the_copies_used_longest_ago_go_first_and_only_as_many_as_need_be(cache: Path) -> None:
    old = copy(cache, "rounded/old", hours_ago=30)
    others = [
        copy(cache, name, hours_ago=hours)
        for name, hours in (("artifacts/a", 20), ("inputs/b", 10), ("rounded/c", 5))
    ]
    make_room()
    assert not old.exists()
    assert all((other / "weights").stat().st_size == MEGABYTE for other in others)
    make_room()
    assert all(other.exists() for other in others), "within the limit nothing goes"
    make_room(2 * MEGABYTE)
    assert [other.exists() for other in others] == [False, False, True]
    assert not list(cache.rglob("*.gone"))


def test_what_was_asked_for_within_the_hour_stays(cache: Path) -> None:
    young = [copy(cache, f"rounded/{number}", hours_ago=0.9) for number in range(5)]
    make_room()
    assert all(entry.exists() for entry in young)
    old = copy(cache, "artifacts/old", hours_ago=2)
    use(old / "policy")
    make_room()
    assert old.exists()


def test_what_is_held_stays_until_its_owner_is_gone(cache: Path) -> None:
    entry = copy(cache, "artifacts/held", hours_ago=9, size=5 * MEGABYTE)
    owner = Owner()
    hold(entry / "policy", owner)
    lock = entry.with_name("held.used")
    os.utime(lock, (0, 0))
    make_room()
    assert entry.exists()
    del owner
    gc.collect()
    make_room()
    assert not entry.exists()
    release = hold(entry, owner := Owner())
    copy(cache, "artifacts/held", hours_ago=9, size=5 * MEGABYTE)
    make_room()
    assert entry.exists()
    release()
    make_room()
    assert not entry.exists()
    assert owner


def test_what_another_process_holds_stays_until_it_is_killed(cache: Path) -> None:
    entry = copy(cache, "rounded/held", hours_ago=9, size=5 * MEGABYTE)
    program = (
        "import sys, pathlib; from qrpo_core.common.local_copies import hold\n"
        "hold(pathlib.Path(sys.argv[1]), sys); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(entry)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        os.utime(entry.with_name("held.used"), (0, 0))
        make_room()
        assert entry.exists()
        other.kill()
    make_room()
    assert not entry.exists()


def test_a_copy_in_the_making_stays(cache: Path) -> None:
    part = cache / "rounded" / "x.part"
    part.mkdir(parents=True)
    (part / "weights").write_bytes(b"\0" * 5 * MEGABYTE)
    os.utime(part, (0, 0))
    make_room()
    assert part.exists(), "its file was written to a moment ago"
    os.utime(part / "weights", (0, 0))
    make_room()
    assert not part.exists(), "its maker was killed"


def test_a_full_disk_counts_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_CACHE_GB", "20")
    entries = [copy(cache, f"rounded/{number}", hours_ago=9 - number) for number in range(3)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, MEGABYTE))  # type: ignore[attr-defined]
    make_room(MEGABYTE)
    assert all(entry.exists() for entry in entries)
    make_room(3 * MEGABYTE)
    assert [entry.exists() for entry in entries] == [False, False, True]


def test_directories_elsewhere_are_left_alone(cache: Path, tmp_path: Path) -> None:
    make_room(10**12)
    elsewhere = tmp_path / "model"
    elsewhere.mkdir()
    hold(elsewhere, Owner())()
    use(elsewhere)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_limit_is_a_number_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRPO_CACHE_GB", raising=False)
    assert limit() == 20e9
    monkeypatch.setenv("QRPO_CACHE_GB", "0.5")
    assert limit() == 0.5e9
    for wrong in ("ten", "-1", "nan"):
        monkeypatch.setenv("QRPO_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=rf"{wrong}.*QRPO_CACHE_GB.*0 or more"):
            limit()
