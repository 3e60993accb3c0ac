"""Caches in odd places: links, relative paths, a store in their place, other users, no locks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.local_copies import Hold, make_room, mark, use
from qrpo_core.store import inputs
from qrpo_core.store.backends.local import LocalObjects
from tests.core.common.copies import MEGABYTE, age, cache, copy

__all__ = ["cache"]


def test_a_store_in_the_place_of_the_cache_is_left_alone(cache: Path, tmp_path: Path) -> None:
    """Both have folders of the same names."""
    (tmp_path / "prompts").write_text("x" * 4 * MEGABYTE)
    address = inputs.put(LocalObjects(cache), {"prompts": tmp_path / "prompts"})
    kept = cache / "artifacts" / "train" / "key" / "manifest.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    use(kept.parent)
    Hold(kept.parent / "policy").close()
    for path in (*cache.rglob("*"), cache):
        os.utime(path, (0, 0))
    make_room(10**12)
    assert kept.exists()
    assert inputs.fetch(LocalObjects(cache), f"{address}/prompts").exists()


@pytest.mark.parametrize("name", ["no mark", "mark", "lock"])
def test_a_cache_that_is_not_ours_or_has_no_locks_is_used_and_left(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)

    def refused(*given: object, **named: object) -> None:
        raise PermissionError(13, "not yours")

    if name == "no mark":
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
    monkeypatch.setenv("QRPO_CACHE", "~nobody-of-this-name/cache")
    assert cache_directory() == tmp_path / "~nobody-of-this-name" / "cache"
    monkeypatch.delenv("QRPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_directory() == cache / "qrpo"


def test_a_cache_behind_a_link_is_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large disk").mkdir()
    cache.symlink_to(tmp_path / "large disk")
    entry = copy(cache, "rounded/a", hours_ago=9, size=5 * MEGABYTE)
    for path in (entry, entry.resolve()):
        with Hold(path):
            age(entry, 9)
            make_room(0)
            assert entry.exists()
    make_room(0)
    assert not entry.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment, which takes root")
def test_what_another_user_made_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a folder that both may write to, but not the mark."""
    monkeypatch.setenv("QRPO_CACHE_GB", "0")
    with tempfile.TemporaryDirectory() as shared:
        monkeypatch.setenv("QRPO_CACHE", shared)
        entry = copy(Path(shared), "rounded/a", hours_ago=9)
        entry.with_name("a.used").chmod(0o644)
        for folder in (Path(shared), entry.parent):
            folder.chmod(0o777)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                entry.with_name("a.used").open("r+b")
            mark(entry)
            held = Hold(entry)
            make_room(0)  # it deletes nothing that is not its own
        finally:
            os.seteuid(0)
        age(entry, 9)
        make_room(0)
        assert entry.exists()
        held.close()
        make_room(0)
        assert not entry.exists()
