"""Damaged blocks on both back ends: they are told, set aside, and only their rows made again."""

from __future__ import annotations

import json
import logging

import pytest

from qrpo_core.config import StoreConfig
from qrpo_core.errors import AccessError, DamagedError, StoreError
from qrpo_core.records import LOGPROBS
from qrpo_core.store.blocks import Blocks, Run
from qrpo_core.store.objects import Objects, open_objects
from tests.faults.rows import RECIPE, commit, fill, read, rows

FIVE = {"p": range(3), "q": range(2)}


def damage(objects: Objects, key: str, how: str) -> None:
    """Flip a byte of an object, cut it, or remove it."""
    data = bytearray(objects.read(key))
    if how == "missing":
        objects.delete(key)
    elif how == "truncated":
        objects.write(key, bytes(data[: len(data) // 2]))
    else:
        data[len(data) // 2] ^= 1
        objects.write(key, bytes(data))


class TestDamage:
    @pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
    @pytest.mark.parametrize("reader", ["read", "read_pairs"])
    def test_a_damaged_block_is_told_set_aside_and_made_again(
        self, objects: Objects, how: str, reader: str
    ) -> None:
        blocks = Blocks(objects)
        fill(blocks, FIVE, rows_per_block=3)
        before = read(blocks, FIVE)
        hurt = next(block for block in blocks.committed(RECIPE) if block.rows == 3)
        damage(objects, hurt.file, how)
        fresh = Blocks(objects)
        calls = {
            "read": lambda: read(fresh, FIVE),
            "read_pairs": lambda: fresh.read_pairs(RECIPE, [("q", 0), ("p", 2)], LOGPROBS),
        }
        told = "3 rows are set aside, the first of them p:0, p:1, p:2"
        with pytest.raises(DamagedError, match=told) as error:
            calls[reader]()
        assert hurt.block in str(error.value)
        assert "only these rows are made again" in str(error.value)
        for again in (fresh, blocks, Blocks(objects)):
            assert [plan.runs for plan in again.plan(RECIPE, FIVE, 3)] == [(Run("p", 0, 3),)]
        assert fill(fresh, FIVE, rows_per_block=3) == 3
        for again in (fresh, blocks, Blocks(objects)):
            assert read(again, FIVE).equals(before)
        (aside,) = fresh.aside()
        assert (aside.block, aside.rows, aside.step, aside.key) == (hurt.block, 3, "logprob", RECIPE.key)
        assert aside.path == f"aside/logprob/{RECIPE.key}/{hurt.block}.json"
        assert aside.why in str(error.value)
        assert json.loads(objects.read(aside.path))["manifest"]["digest"] == hurt.digest

    def test_all_damaged_blocks_are_told_at_once(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(12)})
        for block in blocks.committed(RECIPE)[:2]:
            damage(objects, block.file, "flipped")
        with pytest.raises(DamagedError, match=r"2 blocks are damaged .* 8 rows are set aside"):
            read(blocks, {"p": range(12)})
        assert fill(blocks, {"p": range(12)}) == 8

    def test_a_block_that_is_damaged_twice_is_set_aside_twice(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        for number in range(2):
            plan = blocks.plan(RECIPE, {"p": range(2)}, 2)[0]
            block = blocks.commit(plan, rows(list(plan.pairs())), LOGPROBS, number)
            damage(objects, block.file, "missing")
            with pytest.raises(DamagedError):
                read(blocks, {"p": range(2)})
        assert [aside.path.endswith("-2.json") for aside in blocks.aside()] == [True, False]

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"\xff\xfe", b"null", "cut", "other rows", "row count", "other recipe"],
        ids=str,
    )
    def test_a_damaged_manifest_is_set_aside_and_planned_again(
        self, objects: Objects, content: bytes | str, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(Blocks(objects), FIVE, rows_per_block=3)
        before = read(Blocks(objects), FIVE)
        hurt = next(block for block in Blocks(objects).committed(RECIPE) if block.rows == 3)
        raw = objects.read(hurt.index)
        swaps = {
            "cut": raw[:-20],
            "other rows": raw.replace(b'["p",0,3]', b'["p",1,3]'),
            "row count": raw.replace(b'"rows":3', b'"rows":4'),
            "other recipe": raw.replace(RECIPE.key.encode(), b"0" * 32),
        }
        objects.write(hurt.index, swaps[content] if isinstance(content, str) else content)
        blocks = Blocks(objects)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            assert [plan.runs for plan in blocks.plan(RECIPE, FIVE, 3)] == [(Run("p", 0, 3),)]
        assert hurt.index in caplog.text
        assert [aside.entry for aside in blocks.aside()] == [hurt.index]
        assert fill(blocks, FIVE, rows_per_block=3) == 3
        assert read(Blocks(objects), FIVE).equals(before)

    def test_a_store_that_may_only_be_read_is_planned_on(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(Blocks(objects), FIVE, rows_per_block=3)
        damaged = Blocks(objects).committed(RECIPE)
        objects.write(damaged[0].index, b"")
        damage(objects, damaged[1].file, "missing")

        def refused(*_: object) -> None:
            raise AccessError("not allowed")

        monkeypatch.setattr(objects, "create", refused)
        monkeypatch.setattr(objects, "delete", refused)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            planned = Blocks(objects).plan(RECIPE, FIVE, 8)
        assert sum(plan.rows for plan in planned) == damaged[0].rows
        assert "Left out" in caplog.text
        with pytest.raises(DamagedError, match=r"are lost.*could not be set aside"):
            read(Blocks(objects), FIVE)

    def test_a_manifest_of_a_newer_format_is_left_alone(self, objects: Objects) -> None:
        fill(Blocks(objects), {"p": range(2)})
        (block,) = Blocks(objects).committed(RECIPE)
        raw = json.loads(objects.read(block.index)) | {"format": 3}
        objects.write(block.index, json.dumps(raw).encode())
        with pytest.raises(StoreError, match="another format"):
            Blocks(objects).plan(RECIPE, {"p": range(2)}, 2)
        assert objects.exists(block.index)

    def test_a_fresh_block_is_not_set_aside_for_an_old_one(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 2)[0]
        old = commit(one, plan, 1.0)
        two.set_aside(old, "for a test")
        fresh = two.commit(plan, rows(list(plan.pairs()), 2.0), LOGPROBS, 99.0)
        objects.delete(old.file)  # so that the first reader finds its block damaged
        assert read(one, {"p": range(2)})["logprob"].to_pylist() == [2.0, 1.0]
        assert one.set_aside(old, "late") == ""
        assert two.committed(RECIPE) == [fresh]

    def test_how_often_content_is_compared(self, store: StoreConfig) -> None:
        objects = open_objects(store)
        wanted = {"p": range(60)}
        fill(Blocks(objects), wanted, rows_per_block=1)
        for block in Blocks(objects).committed(RECIPE):
            file = bytearray(objects.read(block.file))
            at = bytes(file).rindex(b"parquet-cpp")  # who wrote it: still a table of these rows
            file[at] ^= 1
            objects.write(block.file, bytes(file))
        never = Blocks(objects, store.model_copy(update={"verify": "never"}))
        assert read(never, wanted).num_rows == 60
        sampled = Blocks(objects, store.model_copy(update={"verify": "sampled"}))
        with pytest.raises(DamagedError, match="blocks are damaged"):
            read(sampled, wanted)
        lost = len(list(sampled.aside()))
        assert 1 <= lost <= 15
        with pytest.raises(DamagedError):
            read(Blocks(objects), {"p": range(59)} | {"q": ()})
        assert len(list(sampled.aside())) == 60

    @pytest.mark.parametrize("how", ["truncated", "missing"])
    def test_what_is_gone_is_noticed_without_comparing(self, store: StoreConfig, how: str) -> None:
        objects = open_objects(store)
        never = Blocks(objects, store.model_copy(update={"verify": "never"}))
        fill(never, {"p": range(2)})
        damage(objects, never.committed(RECIPE)[0].file, how)
        with pytest.raises(DamagedError):
            read(never, {"p": range(2)})

    def test_verify_looks_at_everything_and_changes_nothing(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(16)})
        there = blocks.committed(RECIPE)
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4
        damage(objects, there[0].file, "flipped")
        damage(objects, there[1].file, "missing")
        damage(objects, there[2].index, "truncated")
        before = list(objects.keys(""))
        checks = {check.key: check for check in blocks.verify(RECIPE)}
        assert list(objects.keys("")) == before
        assert [checks[block.index].damage != "" for block in there] == [True, True, True, False]
        assert [checks[block.index].manifest for block in there] == [there[0], there[1], None, there[3]]
        assert sum(check.rows for check in checks.values()) == 12
        for check in checks.values():
            if check.damage:
                assert blocks.set_aside(check.manifest or check.key, check.damage)
        assert fill(blocks, {"p": range(16)}) == 12
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4
