"""The cache directory stays within its limit, and takes nothing away from who reads it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qrpo_core.common import local_copies
from qrpo_core.common.errors import ConfigError, StoreError
from qrpo_core.common.local_copies import Hold, limit, make_room, mark, taken, use, written
from tests.core.common.copies import MEGABYTE, age, cache, copy

__all__ = ["cache"]


def test_the_copies_used_longest_ago_go_first_and_only_as_many_as_need_be(cache: Path) -> None:
    old = copy(cache, "rounded/old", hours_ago=30)
    others = [
        copy(cache, name, hours_ago=hours)
        for name, hours in (("artifacts/a", 20), ("inputs/b", 10), ("rounded/c", 5))
    ]
    make_room(0)
    assert not old.exists()
    assert all((other / "weights").stat().st_size == MEGABYTE for other in others)
    make_room(0)
    assert [other.exists() for other in others] == [True] * 3, "within the limit nothing goes"
    make_room(2 * MEGABYTE)
    assert [other.exists() for other in others] == [False, False, True]
    assert not list(cache.rglob("*.gone"))


def test_what_was_asked_for_within_the_hour_stays(cache: Path) -> None:
    young = [copy(cache, f"rounded/{number}", hours_ago=0.9) for number in range(5)]
    make_room(0)
    assert all(entry.exists() for entry in young)
    old = copy(cache, "artifacts/old", hours_ago=2)
    use(old / "policy")
    make_room(0)
    assert old.exists()


def test_what_is_asked_for_while_others_are_deleted_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    second = copy(cache, "rounded/b", hours_ago=8, size=5 * MEGABYTE)
    delete: Callable[[Path], bool] = local_copies._delete

    def slowly(entry: Path) -> bool:
        if entry == first:
            use(second)
        return delete(entry)

    monkeypatch.setattr(local_copies, "_delete", slowly)
    make_room(0)
    assert not first.exists()
    assert second.exists()


def test_what_is_held_stays_until_it_is_let_go_or_forgotten(cache: Path) -> None:
    entry = copy(cache, "artifacts/held", hours_ago=9, size=5 * MEGABYTE)
    held: Hold | None = Hold(entry / "policy")
    age(entry, 9)
    make_room(0)
    assert entry.exists()
    held = None
    gc.collect()
    make_room(0)
    assert not entry.exists()
    with Hold(entry):
        copy(cache, "artifacts/held", hours_ago=9, size=5 * MEGABYTE)
        make_room(0)
        assert entry.exists()
    make_room(0)
    assert not entry.exists()
    assert held is None


def test_what_another_process_holds_stays_until_it_is_killed(cache: Path) -> None:
    entry = copy(cache, "rounded/held", hours_ago=9, size=5 * MEGABYTE)
    program = (
        "import sys, pathlib; from qrpo_core.common.local_copies import Hold\n"
        "held = Hold(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(entry)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        age(entry, 9)
        make_room(0)
        assert entry.exists()
        other.kill()
    make_room(0)
    assert not entry.exists()


def test_a_copy_in_the_making_stays(cache: Path) -> None:
    mark(cache / "rounded" / "x")
    part = cache / "rounded" / "x.part"
    part.mkdir()
    (part / "weights").write_bytes(b"\0" * 5 * MEGABYTE)
    age(part, 9)
    (part / "weights").write_bytes(b"\0" * 5 * MEGABYTE)
    make_room(0)
    assert part.exists(), "its file was written to a moment ago"
    age(part, 9)
    with Hold(cache / "rounded" / "x"):
        age(part, 9)
        make_room(0)
        assert part.exists()
    make_room(0)
    assert not part.exists(), "its maker was killed"


def test_processes_that_make_use_and_delete_copies_at_once_lose_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What every reader does: hold, look, make if it is not there, read."""
    program = f"""
import os, pathlib, random, shutil, sys, tempfile
from qrpo_core.common import local_copies
local_copies._SECONDS = 0
folder = pathlib.Path({str(cache)!r}) / "artifacts"
for turn in range(150):
    entry = folder / str(random.randrange(6))
    local_copies.mark(entry)
    with local_copies.Hold(entry):
        if not (entry / "weights").is_file():
            local_copies.make_room({MEGABYTE})
            entry.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=entry) as scratch:
                part = pathlib.Path(scratch, "part")
                part.write_bytes(b"x" * {MEGABYTE})
                os.replace(part, entry / "weights")
        assert len((entry / "weights").read_bytes()) == {MEGABYTE}
"""
    running = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [process.communicate()[1] for process in running] == [""] * 4
    monkeypatch.setattr(local_copies, "_SECONDS", 0)
    make_room(MEGABYTE)
    assert taken(cache / "artifacts") <= 2.1 * MEGABYTE


def test_a_full_disk_counts_where_that_helps(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_CACHE_GB", "20")
    entries = [copy(cache, f"rounded/{number}", hours_ago=9 - number) for number in range(3)]
    usage = shutil._ntuple_diskusage(10, 9, MEGABYTE)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    make_room(MEGABYTE)
    make_room(100 * MEGABYTE)
    assert all(entry.exists() for entry in entries), "there is room, or all copies together are too little"
    make_room(int(2.5 * MEGABYTE))
    assert [entry.exists() for entry in entries] == [False, False, True]


def test_what_cannot_be_deleted_is_left_and_does_not_grow(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *given, **named: None)
        for _ in range(3):
            make_room(0)
    assert sorted(path.name for path in entry.parent.iterdir()) == ["a.gone", "a.used"]
    use(entry)
    make_room(0)
    assert [path.name for path in entry.parent.iterdir()] == ["a.used"]


def test_sizes_are_taken_while_files_come_and_go(cache: Path) -> None:
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            folder = cache / "artifacts" / "a" / "tmp"
            folder.mkdir(parents=True)
            (folder / "part").touch()
            shutil.rmtree(folder)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(500):
            taken(cache / "artifacts")
            make_room(0)
    finally:
        stop.set()
        thread.join()


def test_what_cannot_be_written_is_one_line(cache: Path) -> None:
    cache.write_text("no folder")
    named = pytest.raises(StoreError, match=r"cannot write a copy to the cache: .*QRPO_CACHE")
    with named, written("a copy to the cache", cache / "rounded" / "a"):
        mark(cache / "rounded" / "a")


def test_the_limit_is_a_number_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRPO_CACHE_GB", raising=False)
    assert limit() == 20e9
    monkeypatch.setenv("QRPO_CACHE_GB", "0.5")
    assert limit() == 0.5e9
    for wrong in ("ten", "-1", "nan", "inf"):
        monkeypatch.setenv("QRPO_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=rf"{wrong}.*QRPO_CACHE_GB.*0 or more"):
            limit()
