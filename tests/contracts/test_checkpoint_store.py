"""Checkpoints in the store: written once, complete or not there, two are kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.checkpoint_store import MARKER, CheckpointStore, stored_trainings
from qrpo_core.store.recipe import Recipe
from qrpo_core.training.checkpoints import damage, seal

RECIPE = Recipe("train", 1, {"training": {"seed": 0}}, {"policy": "a"})
FACTS = {"training": "a", "layout": "tensors", "processes": 2}


@pytest.fixture
def stored(store: StoreConfig) -> CheckpointStore:
    return CheckpointStore(store, RECIPE)


def checkpoint(folder: Path, step: int) -> Path:
    """A sealed checkpoint with a hidden file and one in a folder."""
    made = folder / f"checkpoint-{step}"
    (made / "tensors").mkdir(parents=True)
    (made / "tensors" / ".metadata").write_bytes(b"m")
    (made / "tensors" / "__0_0.distcp").write_bytes(bytes([step]) * 100)
    seal(made, FACTS)
    return made


def steps(stored: CheckpointStore) -> list[int]:
    return [each.step for each in stored.complete()]


def test_what_was_put_is_what_one_gets(stored: CheckpointStore, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, 7)
    assert stored.complete() == []
    assert stored.put(made, 7)
    (each,) = CheckpointStore.from_json(stored.to_json()).complete()
    assert (each.step, each.facts, sorted(each.files)) == (
        7,
        FACTS,
        ["tensors/.metadata", "tensors/__0_0.distcp"],
    )
    stored.get(each, tmp_path / "copy")
    assert damage(tmp_path / "copy") == ""
    assert (tmp_path / "copy" / "tensors" / "__0_0.distcp").read_bytes() == bytes([7]) * 100
    assert [check.damage for check in stored.check()] == ["", ""]
    assert [each.key for each in stored_trainings(stored.objects)] == [RECIPE.key]


def test_two_are_kept_and_the_last_goes_with_the_training(stored: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        assert stored.put(checkpoint(tmp_path, step), step)
    assert steps(stored) == [11, 10]
    assert len(list(stored.objects.keys("checkpoints/"))) == 1 + 2 * 3  # the recipe, and three files each
    stored.delete()
    assert list(stored.objects.keys("")) == []


def test_who_is_behind_puts_nothing(
    stored: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stored.put(checkpoint(tmp_path, 5), 5)
    assert not stored.put(checkpoint(tmp_path, 4), 4)
    assert steps(stored) == [5]
    assert "another machine is ahead" in caplog.text


def test_two_machines_at_one_step_do_not_touch_each_other(stored: CheckpointStore, tmp_path: Path) -> None:
    for machine in ("one", "two"):
        assert stored.put(checkpoint(tmp_path / machine, 5), 5)
    assert steps(stored) == [5, 5]
    for each in stored.complete():
        stored.get(each, tmp_path / each.folder.rpartition("/")[2])


def test_what_was_not_finished_is_not_there(stored: CheckpointStore, tmp_path: Path) -> None:
    asked = iter([False, True])
    assert not stored.put(checkpoint(tmp_path, 3), 3, lambda: next(asked))
    assert steps(stored) == []
    half = [key for key in stored.objects.keys(f"{stored.folder}/") if not key.endswith("recipe.json")]
    assert len(half) == 1
    for step in (4, 5):
        stored.put(checkpoint(tmp_path, step), step)
    assert not stored.objects.exists(half[0])


def test_damage_is_found_and_taken_away(
    stored: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        stored.put(checkpoint(tmp_path, step), step)
    last, first = stored.complete()
    key = f"{last.folder}/tensors/__0_0.distcp"
    stored.objects.write(key, b"other")
    assert [check.key for check in stored.check() if check.damage] == [key]
    with pytest.raises(DamagedError, match="content and digest differ"):
        stored.get(last, tmp_path / "damaged")
    stored.objects.delete(key)
    with pytest.raises(MissingError):
        stored.get(last, tmp_path / "gone")
    stored.discard(last)
    assert stored.complete() == [first]
    stored.objects.write(f"{first.folder}/{MARKER}", b'{"fi')
    with caplog.at_level(logging.WARNING):
        assert stored.complete() == []
    assert f"{MARKER} cannot be read" in caplog.text


def test_a_directory_takes_the_file_itself(local_store: StoreConfig, tmp_path: Path) -> None:
    """So a checkpoint on the store's own disk takes no more space there."""
    stored, made = CheckpointStore(local_store, RECIPE), checkpoint(tmp_path, 1)
    stored.put(made, 1)
    (each,) = stored.complete()
    objects: Objects = stored.objects
    path = objects.local(f"{each.folder}/tensors/__0_0.distcp")
    assert path is not None
    assert path.samefile(made / "tensors" / "__0_0.distcp")
