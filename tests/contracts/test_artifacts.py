"""Whole artifacts on both back ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.local_copies import Hold
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

RECIPE = Recipe("train", 1, {"lr": 1}, {"data": "d"})
OTHER = Recipe("train", 1, {"lr": 2}, {"data": "d"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads of a test do not meet those of another."""
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))


def made(objects: Objects, recipe: Recipe = RECIPE, **facts: object) -> Manifest:
    return ArtifactStore(objects).commit(recipe, {"a": b"123", "policy/w": b"weights"}, dict(facts), 1.5)


def damage(objects: Objects, key: str, how: str) -> None:
    data = objects.read(key)
    if how == "missing":
        objects.delete(key)
    elif how == "truncated":
        objects.write(key, data[:-1])
    else:
        objects.write(key, bytes([data[0] ^ 1]) + data[1:])


def test_commit_then_find(objects: Objects, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    artifacts = ArtifactStore(objects)
    assert artifacts.find(RECIPE) is None
    made = artifacts.commit(RECIPE, {"policy/w": tmp_path / "w", "a.json": b"{}"}, {"rows": 3}, 1.5)
    assert artifacts.find(RECIPE) == made
    assert artifacts.read(made, "a.json") == b"{}"
    assert (artifacts.folder(made, "policy") / "w").read_bytes() == b"weights"
    assert made.facts == {"rows": 3}


def test_artifacts_of_one_second_have_an_order(objects: Objects) -> None:
    """Runs are listed by it, and `qrpo diff` compares them in it."""
    dates = []
    for rate in range(4):
        recipe = Recipe("train", 1, {"lr": rate}, {"data": "d"})
        dates.append(made(objects, recipe).created)
        time.sleep(0.002)
    assert dates == sorted(set(dates))


def test_the_loser_of_a_race_gets_the_winners(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    winner = artifacts.commit(RECIPE, {"a": b"1"}, {"exact": True}, 0)
    assert artifacts.commit(RECIPE, {"a": b"2"}, {}, 0) == winner
    assert artifacts.commit(RECIPE, {"a": b"1"}, {"exact": True}, 7) == winner
    assert artifacts.read(winner, "a") == b"1"


def test_two_contents_of_a_reproducible_step_are_refused(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    winner = artifacts.commit(RECIPE, {"a": b"1", "b": b"1"}, {"exact": True}, 0)
    with pytest.raises(StoreError, match="the first file that differs is b") as error:
        artifacts.commit(RECIPE, {"a": b"1", "b": b"2"}, {"exact": True}, 0)
    assert winner.folder in str(error.value)
    assert artifacts.find(RECIPE) == winner


def test_nothing_is_found_before_the_manifest(objects: Objects) -> None:
    objects.write(f"{RECIPE.path}/0123/a", b"half")
    assert ArtifactStore(objects).find(RECIPE) is None
    assert list(ArtifactStore(objects).manifests()) == []


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_noticed_by_every_reader(objects: Objects, how: str) -> None:
    artifacts = made(objects), ArtifactStore(objects)
    manifest, artifacts = artifacts
    for name in ("a", "policy/w"):
        damage(objects, manifest.path(name), how)
    for call in (
        lambda: artifacts.read(manifest, "a"),
        lambda: artifacts.file(manifest, "a"),
        lambda: artifacts.folder(manifest, "policy"),
    ):
        with pytest.raises(DamagedError) as error:
            call()
        assert manifest.folder in str(error.value)
    damages = [(check.key, bool(check.damage)) for check in artifacts.verify(manifest)]
    assert damages == [(manifest.path("a"), True), (manifest.path("policy/w"), True)]


def test_what_never_is_checked_is_still_noticed_when_cut(objects: Objects) -> None:
    manifest, careless = made(objects), ArtifactStore(objects, "never")
    damage(objects, manifest.path("a"), "flipped")
    assert careless.read(manifest, "a") != b"123"
    damage(objects, manifest.path("a"), "truncated")
    with pytest.raises(DamagedError):
        careless.read(manifest, "a")


def test_a_file_is_compared_once_a_process(
    local_store: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qrpo_core.store import artifacts as module
    from qrpo_core.store.backends.local import LocalObjects

    objects = LocalObjects(tmp_path / "store")
    manifest, artifacts = made(objects), ArtifactStore(objects)
    digested: list[str] = []
    real = module.digest_file
    monkeypatch.setattr(module, "digest_file", lambda path: digested.append(os.fspath(path)) or real(path))
    for _ in range(3):
        artifacts.file(manifest, "a")
    assert len(digested) == 1


def test_downloads_make_room_for_each_other_and_come_again(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison reads many policies from a remote store."""
    if objects.local("x") is not None:
        pytest.skip("nothing is downloaded from a local store")
    monkeypatch.setenv("QRPO_CACHE_GB", "0")
    monkeypatch.setattr("qrpo_core.common.local_copies._SECONDS", 0)
    one, two = made(objects), made(objects, OTHER)
    reader = ArtifactStore(objects)
    folder = reader.folder(one, "policy")
    with Hold(folder):
        other = reader.folder(two, "policy")
        assert folder.exists()
    reader.folder(made(objects, Recipe("train", 1, {"lr": 3}, {"data": "d"})), "policy")
    assert not folder.exists()
    assert not other.exists()
    assert (reader.folder(one, "policy") / "w").read_bytes() == b"weights", "downloaded again"


def test_of_a_folder_some_files_can_be_left_for_later(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    policy = artifacts.commit(RECIPE, {"policy/w.safetensors": b"large", "policy/a/b.json": b"{}"}, {}, 1.5)
    objects.write(policy.path("policy/w.safetensors"), b"small")
    folder = artifacts.folder(policy, "policy", but=["*.safetensors"])
    assert (folder / "a" / "b.json").read_bytes() == b"{}"
    with pytest.raises(DamagedError):
        artifacts.folder(policy, "policy")


def test_a_cache_that_cannot_be_written_is_named(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if objects.local("x") is not None:
        pytest.skip("nothing is downloaded from a local store")
    (tmp_path / "file").touch()
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"cannot write a copy to the cache: .*QRPO_CACHE"):
        ArtifactStore(objects).folder(made(objects), "policy")


def test_quarantined_it_is_made_again(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    manifest = made(objects)
    other = made(objects, OTHER)
    path = artifacts.quarantine(manifest, "for a test")
    assert path == f"quarantine/{RECIPE.step}/{RECIPE.key}/manifest.json"
    assert artifacts.find(RECIPE) is None
    assert list(artifacts.manifests()) == [other]
    assert artifacts.quarantine(manifest, "again") == ""
    again = made(objects)
    assert artifacts.read(again, "a") == b"123"
    assert artifacts.quarantine(again, "again").endswith("/manifest-2.json") or again == manifest
    told = [(each.step, each.key, each.block, each.rows) for each in BlockStore(objects).quarantined()]
    assert told[0] == (RECIPE.step, RECIPE.key, "manifest", 0)


def test_a_fresh_artifact_is_not_quarantined_for_an_old_one(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    old = made(objects)
    objects.delete(old.manifest_key)
    fresh = artifacts.commit(RECIPE, {"a": b"other"}, {}, 0)
    assert artifacts.quarantine(old, "damaged") == ""
    assert artifacts.find(RECIPE) == fresh


def test_an_unreadable_manifest_is_told_and_can_be_quarantined(objects: Objects) -> None:
    artifacts = ArtifactStore(objects)
    kept, hurt = sorted([made(objects), made(objects, OTHER)], key=lambda each: each.manifest_key)
    recipe = next(each for each in (RECIPE, OTHER) if each.key == hurt.key)
    data = objects.read(hurt.manifest_key)
    for content in (b"", data[:-9], data.replace(b'"lr":', b'"rl":')):
        objects.write(hurt.manifest_key, content)
        with pytest.raises(DamagedError):
            artifacts.find(recipe)
        found = []
        with pytest.raises(DamagedError, match="1 artifacts are damaged"):
            found.extend(artifacts.manifests())
        checks = {check.key: (bool(check.damage), check.manifest) for check in artifacts.check_manifests()}
        assert checks == {kept.manifest_key: (False, kept), hurt.manifest_key: (True, None)}
        assert artifacts.quarantine(hurt.manifest_key, "unreadable")
        assert artifacts.find(recipe) is None
    assert len(list(BlockStore(objects).quarantined())) == 3


def test_manifests_are_those_of_a_step(objects: Objects) -> None:
    mine = made(objects)
    theirs = made(objects, Recipe("quantiles", 1))
    artifacts = ArtifactStore(objects)
    assert list(artifacts.manifests("train")) == [mine]
    assert list(artifacts.manifests()) == [theirs, mine]
    assert artifacts.recipes("train") == [RECIPE.to_dict()]


def test_a_name_that_it_has_not_is_missing(objects: Objects) -> None:
    with pytest.raises(MissingError, match="no file 'b'"):
        ArtifactStore(objects).read(made(objects), "b")
    with pytest.raises(MissingError, match="no folder 'x'"):
        ArtifactStore(objects).folder(made(objects), "x")
