"""Damaged blocks on both back ends: they are told, quarantined, and only their rows made again."""

from __future__ import annotations

import json
import logging

import pytest

from qrpo_core.common.errors import AccessError, DamagedError, StoreError
from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import FORMAT
from qrpo_core.store.blocks.planning import RowRange
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
    @pytest.mark.parametrize("reader", ["read", "read_rows"])
    def test_a_damaged_block_is_told_quarantined_and_made_again(
        self, objects: Objects, how: str, reader: str
    ) -> None:
        blocks = BlockStore(objects)
        fill(blocks, FIVE, rows_per_block=3)
        before = read(blocks, FIVE)
        hurt = next(block for block in blocks.committed(RECIPE) if block.rows == 3)
        damage(objects, hurt.file, how)
        fresh = BlockStore(objects)
        calls = {
            "read": lambda: read(fresh, FIVE),
            "read_rows": lambda: fresh.read_rows(RECIPE, [("q", 0), ("p", 2)], LOGPROBS),
        }
        told = "3 rows are quarantined, the first of them p:0, p:1, p:2"
        with pytest.raises(DamagedError, match=told) as error:
            calls[reader]()
        assert hurt.block in str(error.value)
        assert "only these rows are computed again" in str(error.value)
        for again in (fresh, blocks, BlockStore(objects)):
            assert [plan.ranges for plan in again.plan(RECIPE, FIVE, 3)] == [(RowRange("p", 0, 3),)]
        assert fill(fresh, FIVE, rows_per_block=3) == 3
        for again in (fresh, blocks, BlockStore(objects)):
            assert read(again, FIVE).equals(before)
        (quarantined,) = fresh.quarantined()
        assert (quarantined.block, quarantined.rows, quarantined.step, quarantined.key) == (
            hurt.block,
            3,
            "logprob",
            RECIPE.key,
        )
        assert quarantined.path == f"quarantine/logprob/{RECIPE.key}/{hurt.block}.json"
        assert quarantined.why in str(error.value)
        assert json.loads(objects.read(quarantined.path))["manifest"]["digest"] == hurt.digest

    def test_all_damaged_blocks_are_told_at_once(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        fill(blocks, {"p": range(12)})
        for block in blocks.committed(RECIPE)[:2]:
            damage(objects, block.file, "flipped")
        with pytest.raises(DamagedError, match=r"2 blocks are damaged .* 8 rows are quarantined"):
            read(blocks, {"p": range(12)})
        assert fill(blocks, {"p": range(12)}) == 8

    def test_a_block_that_is_damaged_twice_is_quarantined_twice(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        for number in range(2):
            plan = blocks.plan(RECIPE, {"p": range(2)}, 2)[0]
            block = blocks.commit(plan, rows(list(plan.row_ids())), LOGPROBS, number)
            damage(objects, block.file, "missing")
            with pytest.raises(DamagedError):
                read(blocks, {"p": range(2)})
        assert [quarantined.path.endswith("-2.json") for quarantined in blocks.quarantined()] == [True, False]

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"\xff\xfe", b"null", "cut", "other rows", "row count", "other recipe"],
        ids=str,
    )
    def test_a_damaged_manifest_is_quarantined_and_planned_again(
        self, objects: Objects, content: bytes | str, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(BlockStore(objects), FIVE, rows_per_block=3)
        before = read(BlockStore(objects), FIVE)
        hurt = next(block for block in BlockStore(objects).committed(RECIPE) if block.rows == 3)
        raw = objects.read(hurt.manifest_key)
        swaps = {
            "cut": raw[:-20],
            "other rows": raw.replace(b'["p",0,3]', b'["p",1,3]'),
            "row count": raw.replace(b'"rows":3', b'"rows":4'),
            "other recipe": raw.replace(RECIPE.key.encode(), b"0" * 32),
        }
        objects.write(hurt.manifest_key, swaps[content] if isinstance(content, str) else content)
        blocks = BlockStore(objects)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            assert [plan.ranges for plan in blocks.plan(RECIPE, FIVE, 3)] == [(RowRange("p", 0, 3),)]
        assert hurt.manifest_key in caplog.text
        assert [quarantined.entry for quarantined in blocks.quarantined()] == [hurt.manifest_key]
        assert fill(blocks, FIVE, rows_per_block=3) == 3
        assert read(BlockStore(objects), FIVE).equals(before)

    def test_a_store_that_may_only_be_read_is_planned_on(
        self, objects: Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(BlockStore(objects), FIVE, rows_per_block=3)
        damaged = BlockStore(objects).committed(RECIPE)
        objects.write(damaged[0].manifest_key, b"")
        damage(objects, damaged[1].file, "missing")

        def refused(*_: object) -> None:
            raise AccessError("not allowed")

        monkeypatch.setattr(objects, "put_if_absent", refused)
        monkeypatch.setattr(objects, "delete", refused)
        with caplog.at_level(logging.WARNING, "qrpo.store"):
            planned = BlockStore(objects).plan(RECIPE, FIVE, 8)
        assert sum(plan.rows for plan in planned) == damaged[0].rows
        assert "Left out" in caplog.text
        with pytest.raises(DamagedError, match=r"are lost.*could not be quarantined"):
            read(BlockStore(objects), FIVE)

    @pytest.mark.parametrize(
        ("number", "remedy"), [(1, "store.path"), (2, "store.path"), (FORMAT + 1, "upgrade qrpo")]
    )
    def test_a_manifest_of_another_format_is_refused_and_stays(
        self, objects: Objects, number: int, remedy: str
    ) -> None:
        fill(BlockStore(objects), {"p": range(2)})
        (block,) = BlockStore(objects).committed(RECIPE)
        raw = json.loads(objects.read(block.manifest_key)) | {"format": number}
        if number < FORMAT:  # as the versions before wrote it
            raw = {name: raw[name] for name in raw if name not in ("ranges", "retryable", "generation")}
            raw |= {"runs": [["p", 0, 2]]}
        objects.write(block.manifest_key, json.dumps(raw).encode())
        for _ in range(2):
            with pytest.raises(StoreError, match=f"another version of qrpo wrote this store.*{remedy}"):
                BlockStore(objects).plan(RECIPE, {"p": range(2)}, 2)
        assert list(BlockStore(objects).quarantined()) == []
        assert objects.exists(block.manifest_key)

    def test_a_fresh_block_is_not_quarantined_for_an_old_one(self, objects: Objects) -> None:
        one, two = BlockStore(objects), BlockStore(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 2)[0]
        old = commit(one, plan, 1.0)
        two.quarantine(old, "for a test")
        fresh = two.commit(plan, rows(list(plan.row_ids()), 2.0), LOGPROBS, 99.0)
        objects.delete(old.file)  # so that the first reader finds its block damaged
        assert read(one, {"p": range(2)})["logprob"].to_pylist() == [2.0, 1.0]
        assert one.quarantine(old, "late") == ""
        assert two.committed(RECIPE) == [fresh]

    def test_how_often_content_is_compared(self, store: StoreConfig) -> None:
        objects = open_objects(store)
        wanted = {"p": range(60)}
        fill(BlockStore(objects), wanted, rows_per_block=1)
        for block in BlockStore(objects).committed(RECIPE):
            file = bytearray(objects.read(block.file))
            at = bytes(file).rindex(b"parquet-cpp")  # who wrote it: still a table of these rows
            file[at] ^= 1
            objects.write(block.file, bytes(file))
        never = BlockStore(objects, store.model_copy(update={"verify": "never"}))
        assert read(never, wanted).num_rows == 60
        sampled = BlockStore(objects, store.model_copy(update={"verify": "sampled"}))
        with pytest.raises(DamagedError, match="blocks are damaged"):
            read(sampled, wanted)
        lost = len(list(sampled.quarantined()))
        assert 1 <= lost <= 15
        with pytest.raises(DamagedError):
            read(BlockStore(objects), {"p": range(59)} | {"q": ()})
        assert len(list(sampled.quarantined())) == 60

    @pytest.mark.parametrize("how", ["truncated", "missing"])
    def test_what_is_gone_is_noticed_without_comparing(self, store: StoreConfig, how: str) -> None:
        objects = open_objects(store)
        never = BlockStore(objects, store.model_copy(update={"verify": "never"}))
        fill(never, {"p": range(2)})
        damage(objects, never.committed(RECIPE)[0].file, how)
        with pytest.raises(DamagedError):
            read(never, {"p": range(2)})

    def test_verify_looks_at_everything_and_changes_nothing(self, objects: Objects) -> None:
        blocks = BlockStore(objects)
        fill(blocks, {"p": range(16)})
        there = blocks.committed(RECIPE)
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4
        damage(objects, there[0].file, "flipped")
        damage(objects, there[1].file, "missing")
        damage(objects, there[2].manifest_key, "truncated")
        before = list(objects.keys(""))
        checks = {check.key: check for check in blocks.verify(RECIPE)}
        assert list(objects.keys("")) == before
        assert [checks[block.manifest_key].damage != "" for block in there] == [True, True, True, False]
        assert [checks[block.manifest_key].manifest for block in there] == [
            there[0],
            there[1],
            None,
            there[3],
        ]
        assert sum(check.rows for check in checks.values()) == 12
        for check in checks.values():
            if check.damage:
                assert blocks.quarantine(check.manifest or check.key, check.damage)
        assert fill(blocks, {"p": range(16)}) == 12
        assert [check.damage for check in blocks.verify(RECIPE)] == [""] * 4
