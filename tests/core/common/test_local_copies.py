"""The cache directory stays within its limit, and takes nothing away from who reads it."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qrpo_core.common import local_copies
from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import ConfigError, StoreError
from qrpo_core.common.local_copies import Hold, limit, make_room, taken, use, written
from qrpo_core.store import inputs
from qrpo_core.store.backends.local import LocalObjects

MEGABYTE = 10**6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QRPO_CACHE_GB", "0.003")
    return tmp_path / "cache"


def copy(cache: Path, name: str, *, hours_ago: float, size: int = MEGABYTE) -> Path:
    """A copy that was last asked for so long ago."""
    entry = cache / name
    entry.mkdir(parents=True)
    (entry / "weights").write_bytes(b"\0" * size)
    use(entry)
    age(entry, hours_ago)
    return entry


def age(entry: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for path in (*entry.rglob("*"), entry, entry.with_name(f"{entry.name.split('.')[0]}.used")):
        os.utime(path, (then, then))


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
    use(cache / "rounded" / "x")
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


def test_a_store_in_the_place_of_the_cache_is_left_alone(cache: Path, tmp_path: Path) -> None:
    """Both have folders of the same names."""
    (tmp_path / "prompts").write_text("x" * 4 * MEGABYTE)
    address = inputs.put(LocalObjects(cache), {"prompts": tmp_path / "prompts"})
    kept = cache / "artifacts" / "train" / "key" / "manifest.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for path in (*cache.rglob("*"), cache):
        os.utime(path, (0, 0))
    make_room(10**12)
    assert kept.exists()
    assert inputs.fetch(LocalObjects(cache), f"{address}/prompts").exists()


def test_what_cannot_be_deleted_is_left_and_does_not_grow(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *given, **named: None)
        for _ in range(3):
            make_room(0)
    assert sorted(path.name for path in entry.parent.iterdir()) == ["a.gone", "a.used"]
    age(entry.with_name("a.gone"), 9)
    make_room(0)
    assert [path.name for path in entry.parent.iterdir()] == ["a.used"]


@pytest.mark.parametrize("name", ["limit", "mark", "lock"])
def test_a_cache_that_is_not_ours_or_has_no_locks_is_used_and_left(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)

    def refused(*given: object, **named: object) -> None:
        raise PermissionError(13, "not yours")

    if name == "limit":
        entry.with_name("a.used").unlink()  # of a cache before there were marks, or of another program
    elif name == "mark":
        monkeypatch.setattr(Path, "open", refused)
    else:
        monkeypatch.setattr("fcntl.flock", refused)
    make_room(0)
    assert (entry / "weights").is_file()
    with Hold(entry):
        use(entry)
    assert (entry / "weights").is_file()


def test_directories_elsewhere_are_left_alone(cache: Path, tmp_path: Path) -> None:
    make_room(10**12)
    elsewhere = tmp_path / "model"
    elsewhere.mkdir()
    Hold(elsewhere).close()
    use(elsewhere)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_copy_elsewhere_is_left_alone(cache: Path, tmp_path: Path) -> None:
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    make_room(0)
    assert (entry / "weights").is_file()


def test_a_relative_cache_is_that_of_every_path(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QRPO_CACHE", "cache")
    assert cache_directory() == cache
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    for path in (entry, Path("cache/rounded/a")):
        with Hold(path):
            age(entry, 9)
            make_room(0)
            assert entry.exists()
    monkeypatch.setenv("QRPO_CACHE", "~/cache")
    assert cache_directory() == Path.home() / "cache"


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
    with named, written(cache / "rounded" / "a"):
        use(cache / "rounded" / "a")


def test_the_limit_is_a_number_of_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRPO_CACHE_GB", raising=False)
    assert limit() == 20e9
    monkeypatch.setenv("QRPO_CACHE_GB", "0.5")
    assert limit() == 0.5e9
    for wrong in ("ten", "-1", "nan", "inf"):
        monkeypatch.setenv("QRPO_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match=rf"{wrong}.*QRPO_CACHE_GB.*0 or more"):
            limit()
