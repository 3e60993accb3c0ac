"""One suite for every back end of the store: a directory, and a real S3 server."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.config import StoreConfig
from qrpo_core.errors import AccessError, DamagedError, MissingError, StoreError
from qrpo_core.records import LOGPROBS
from qrpo_core.store.artifacts import Artifacts
from qrpo_core.store.blocks import BlockManifest, Blocks, Run, Wanted, missing_runs
from qrpo_core.store.objects import Objects, S3Objects, open_objects
from qrpo_core.store.recipe import Recipe

RECIPE = Recipe("logprob", 1, {"precision": "fp32"}, {"policy": "p"})


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def objects(request: pytest.FixtureRequest) -> Objects:
    store: StoreConfig = request.getfixturevalue(f"{request.param}_store")
    return open_objects(store)


def rows(pairs: list[tuple[str, int]], value: float = 0.0) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [key for key, _ in pairs],
            "sample_index": pa.array([index for _, index in pairs], pa.int32()),
            "logprob": [value - index for _, index in pairs],
            "num_tokens": pa.array([1] * len(pairs), pa.int32()),
        }
    )


def fill(blocks: Blocks, wanted: Wanted, rows_per_block: int = 4) -> int:
    computed = 0
    for plan in blocks.plan(RECIPE, wanted, rows_per_block):
        blocks.commit(plan, rows(list(plan.pairs())[::-1]), LOGPROBS, 0.1)
        computed += plan.rows
    return computed


class TestObjects:
    def test_what_is_written_is_read(self, objects: Objects) -> None:
        objects.write("a/b", b"one")
        objects.write("a/b", b"two")
        assert objects.read("a/b") == b"two"

    def test_absent_is_missing_everywhere(self, objects: Objects, tmp_path: Path) -> None:
        with pytest.raises(MissingError):
            objects.read("no/such")
        with pytest.raises(MissingError):
            objects.download("no/such", tmp_path / "x")
        assert not objects.exists("no/such")
        assert list(objects.keys("no/")) == []
        objects.delete("no/such")

    def test_create_succeeds_once_and_keeps_the_first(self, objects: Objects) -> None:
        assert objects.create("c", b"first")
        assert not objects.create("c", b"second")
        assert objects.read("c") == b"first"

    def test_of_16_racing_creators_one_wins(self, objects: Objects) -> None:
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i: objects.create("race", str(i).encode()), range(16)))
        assert sum(won) == 1
        assert objects.read("race") == str(won.index(True)).encode()

    def test_keys_are_those_below_the_folder_sorted(self, objects: Objects) -> None:
        for key in ("x/2", "x/1/deep", "xy/3"):
            objects.write(key, b"")
        assert list(objects.keys("x")) == list(objects.keys("x/")) == ["x/1/deep", "x/2"]

    def test_upload_and_download_keep_the_bytes(self, objects: Objects, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(range(256)) * 1000)
        objects.upload(source, "big")
        objects.download("big", target)
        assert target.read_bytes() == source.read_bytes()

    def test_delete_removes(self, objects: Objects) -> None:
        objects.write("d", b"x")
        objects.delete("d")
        assert not objects.exists("d")


class TestArtifacts:
    def test_commit_then_find(self, objects: Objects, tmp_path: Path) -> None:
        (tmp_path / "w").write_bytes(b"weights")
        artifacts = Artifacts(objects)
        assert artifacts.find(RECIPE) is None
        made = artifacts.commit(RECIPE, {"policy/w": tmp_path / "w", "a.json": b"{}"}, {"rows": 3}, 1.5)
        assert artifacts.find(RECIPE) == made
        assert artifacts.read(made, "a.json") == b"{}"
        assert (artifacts.folder(made, "policy") / "w").read_bytes() == b"weights"
        assert made.facts == {"rows": 3}

    def test_the_loser_of_a_race_gets_the_winners(self, objects: Objects) -> None:
        artifacts = Artifacts(objects)
        winner = artifacts.commit(RECIPE, {"a": b"1"}, {}, 0)
        assert artifacts.commit(RECIPE, {"a": b"2"}, {}, 0) == winner
        assert artifacts.read(winner, "a") == b"1"

    def test_a_flipped_byte_is_damage(self, objects: Objects) -> None:
        artifacts = Artifacts(objects)
        made = artifacts.commit(RECIPE, {"a": b"123"}, {}, 0)
        objects.write(made.path("a"), b"124")
        with pytest.raises(DamagedError):
            artifacts.read(made, "a")

    def test_nothing_is_found_before_the_manifest(self, objects: Objects) -> None:
        objects.write(f"{RECIPE.path}/0123/a", b"half")
        assert Artifacts(objects).find(RECIPE) is None


class TestBlocks:
    def test_a_larger_budget_computes_the_new_rows_only(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 6
        assert fill(blocks, {"p": range(3), "q": range(3)}) == 0
        first = blocks.read(RECIPE, {"p": range(3), "q": range(3)}, LOGPROBS)
        assert fill(blocks, {"p": range(6), "new": range(2), "q": range(3)}) == 5
        assert blocks.read(RECIPE, {"p": range(3), "q": range(3)}, LOGPROBS).equals(first)
        table = blocks.read(RECIPE, {"q": range(1), "p": range(6)}, LOGPROBS)
        assert table["prompt_id"].to_pylist() == ["q"] + ["p"] * 6
        assert table["sample_index"].to_pylist() == [0, *range(6)]

    def test_scattered_rows_are_asked_for_and_read_alone(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        assert fill(blocks, {"p": (2, 3, 7), "q": range(1)}) == 4
        assert fill(blocks, {"p": (1, 3, 7)}) == 1
        assert fill(blocks, {"p": range(9)}) == 5
        table = blocks.read(RECIPE, {"q": (0,), "p": (3, 7)}, LOGPROBS)
        assert table["prompt_id"].to_pylist() == ["q", "p", "p"]
        assert table["sample_index"].to_pylist() == [0, 3, 7]

    def test_a_fresh_reader_sees_the_same(self, objects: Objects) -> None:
        fill(Blocks(objects), {"p": range(5)})
        assert Blocks(objects).plan(RECIPE, {"p": range(5)}, 4) == []

    def test_rows_that_are_not_there_are_counted(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(2)})
        with pytest.raises(MissingError, match="3 of 5 rows"):
            blocks.read(RECIPE, {"p": range(5)}, LOGPROBS)

    def test_the_loser_of_a_race_takes_the_winners_block(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        plan = one.plan(RECIPE, {"p": range(2)}, 4)[0]
        winner = one.commit(plan, rows([("p", 0), ("p", 1)], 1.0), LOGPROBS, 0.1)
        assert two.commit(plan, rows([("p", 0), ("p", 1)], 2.0), LOGPROBS, 0.1) == winner
        assert two.read(RECIPE, {"p": range(2)}, LOGPROBS)["logprob"].to_pylist() == [1.0, 0.0]

    def test_the_same_row_in_two_blocks_is_read_once(self, objects: Objects) -> None:
        one, two = Blocks(objects), Blocks(objects)
        small, large = one.plan(RECIPE, {"p": range(2)}, 8)[0], two.plan(RECIPE, {"p": range(4)}, 8)[0]
        one.commit(small, rows(list(small.pairs())), LOGPROBS, 0.1)
        two.commit(large, rows(list(large.pairs())), LOGPROBS, 0.1)
        assert one.read(RECIPE, {"p": range(4)}, LOGPROBS)["sample_index"].to_pylist() == [0, 1, 2, 3]
        assert len(one.read_pairs(RECIPE, [("p", 3), ("p", 0)], LOGPROBS)) == 2

    def test_a_block_must_hold_the_planned_rows(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        plan = blocks.plan(RECIPE, {"p": range(2)}, 4)[0]
        for wrong in ([("p", 0)], [("p", 0), ("p", 2)], [("p", 0), ("p", 0)]):
            with pytest.raises(StoreError, match="planned"):
                blocks.commit(plan, rows(wrong), LOGPROBS, 0.1)
        assert blocks.committed(RECIPE) == []

    def test_a_flipped_byte_is_damage(self, objects: Objects) -> None:
        blocks = Blocks(objects)
        fill(blocks, {"p": range(2)})
        file = blocks.committed(RECIPE)[0].file
        data = bytearray(objects.read(file))
        data[len(data) // 2] ^= 1
        objects.write(file, bytes(data))
        with pytest.raises(DamagedError, match="2 rows"):
            Blocks(objects).read(RECIPE, {"p": range(2)}, LOGPROBS)

    def test_recipes_of_a_step_are_listed(self, objects: Objects) -> None:
        fill(Blocks(objects), {"p": range(1)})
        assert Blocks(objects).recipes("logprob") == [RECIPE.to_dict()]


class TestS3:
    @pytest.mark.slow
    def test_wrong_credentials_are_not_absence(
        self, s3_store: StoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        objects = S3Objects(s3_store)
        objects.fs = type(objects.fs)(endpoint_url=s3_store.endpoint_url, skip_instance_cache=True)
        with pytest.raises(AccessError):
            objects.exists("x")
        with pytest.raises(AccessError):
            objects.read("x")
        with pytest.raises(AccessError):
            objects.create("x", b"")

    @pytest.mark.slow
    def test_no_bucket_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # moto's server, since the other one makes a bucket when it is written to.
        from moto.server import ThreadedMotoServer

        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        server = ThreadedMotoServer("127.0.0.1", 0)
        server.start()
        try:
            host, port = server.get_host_and_port()
            config = StoreConfig(
                path="s3://no-such-bucket/x", endpoint_url=f"http://{host}:{port}", path_style=True
            )
            objects = open_objects(config)
            for call in (
                lambda: objects.write("x", b""),
                lambda: objects.read("x"),
                lambda: list(objects.keys("x")),
            ):
                with pytest.raises(StoreError, match="no bucket 'no-such-bucket'") as error:
                    call()
                assert not isinstance(error.value, MissingError)
        finally:
            server.stop()

    @pytest.mark.slow
    def test_no_server_is_a_store_error(self) -> None:
        config = StoreConfig(path="s3://b/x", endpoint_url="http://127.0.0.1:1", path_style=True)
        objects = S3Objects(config)
        with pytest.raises(StoreError) as error:
            objects.read("x")
        assert not isinstance(error.value, MissingError | AccessError)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreError, match="'gs'"):
        open_objects(StoreConfig(path="gs://bucket"))


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=8),
    st.one_of(st.integers(0, 25).map(range), st.sets(st.integers(0, 25)).map(lambda s: tuple(sorted(s)))),
)
def test_what_is_missing_is_what_is_asked_less_what_is_there(
    there: list[tuple[int, int]], asked: Sequence[int]
) -> None:
    runs = tuple(Run("p", first, count) for first, count in there)
    block = BlockManifest("b", runs, 0, "f", "d", 0, 0.0, "now", "0")
    missing = missing_runs({"p": asked}, [block])
    left = [index for run in missing for index in range(run.first, run.first + run.count)]
    covered = {index for first, count in there for index in range(first, first + count)}
    assert left == [index for index in asked if index not in covered]


def test_pack_splits_runs_at_full_blocks(local_store: StoreConfig) -> None:
    plans = Blocks(open_objects(local_store)).plan(RECIPE, {"p": range(5), "q": range(2)}, 3)
    assert [plan.runs for plan in plans] == [
        (Run("p", 0, 3),),
        (Run("p", 3, 2), Run("q", 0, 1)),
        (Run("q", 1, 1),),
    ]
