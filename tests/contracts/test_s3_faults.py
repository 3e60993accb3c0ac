"""A real S3 server behind a proxy that injects faults: what passes is survived, what is final is said."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qrpo_core.common.errors import AccessError, MissingError, StoreError
from qrpo_core.config import StoreConfig
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends import s3
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.rows import RECIPE, commit, fill, read

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 400


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def behind(proxy: FaultProxy, s3_store: StoreConfig) -> StoreConfig:
    """The store as seen through the proxy; a call that is not answered is tried again after 2 seconds."""
    return s3_store.model_copy(update={"endpoint_url": proxy.url, "retry_seconds": 6.0})


@pytest.fixture
def objects(behind: StoreConfig, proxy: FaultProxy) -> Objects:
    """A store with one object in it."""
    objects = open_objects(behind)
    objects.write("there", DATA)
    proxy.requests.clear()
    return objects


def download(objects: Objects, folder: Path) -> bytes:
    objects.download("there", folder / "copy")
    return (folder / "copy").read_bytes()


def upload(objects: Objects, folder: Path) -> bytes:
    (folder / "source").write_bytes(DATA)
    objects.upload(folder / "source", "uploaded")
    return objects.read("uploaded")


Call = Callable[[Objects, Path], object]

#: Every verb, and what it gives on the store of `objects`.
VERBS: dict[str, tuple[Call, object]] = {
    "read": (lambda o, _: o.read("there"), DATA),
    "write": (lambda o, _: (o.write("new", DATA), o.read("new") == DATA), (None, True)),
    "create": (lambda o, _: (o.put_if_absent("new", DATA), o.read("new") == DATA), (True, True)),
    "create again": (lambda o, _: o.put_if_absent("there", b"other"), False),
    "create the same again": (lambda o, _: o.put_if_absent("there", DATA[:-1]), False),
    "keys": (lambda o, _: list(o.keys("")), ["there"]),
    "exists": (lambda o, _: (o.exists("there"), o.exists("not")), (True, False)),
    "delete": (lambda o, _: (o.delete("there"), o.exists("there")), (None, False)),
    "download": (download, DATA),
    "upload": (upload, DATA),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "fault",
    [
        Fault("slow_down", times=3),
        Fault("server_error", times=3),
        Fault("silence"),
        Fault("cut_request", times=3, after=1000),
        Fault("cut_answer", times=3),
        Fault("cut_answer", "GET", times=3, after=70),
        Fault("short_answer", "GET", times=3, after=70),
        Fault("lost_answer", times=3),
    ],
    ids=lambda fault: f"{fault.kind}{fault.after or ''}",
)
def test_every_verb_survives_what_passes(
    fault: Fault, verb: str, objects: Objects, proxy: FaultProxy, tmp_path: Path
) -> None:
    call, expected = VERBS[verb]
    proxy.inject(replace(fault))
    assert call(objects, tmp_path) == expected
    if fault.kind in ("cut_answer", "short_answer"):
        return  # an answer without a body, or no GET at all, has nothing to cut off
    assert proxy.injected[fault.kind] == fault.times


def test_an_object_whose_creation_was_not_answered_is_ours(objects: Objects, proxy: FaultProxy) -> None:
    proxy.inject(Fault("lost_answer", "PUT"))
    assert objects.put_if_absent("new", DATA)
    assert proxy.requests == {"PUT": 2, "GET": 1}
    assert not objects.put_if_absent("new", DATA)


def test_an_object_of_another_is_not_ours_though_the_answer_was_lost(
    objects: Objects, proxy: FaultProxy
) -> None:
    proxy.inject(Fault("lost_answer", "PUT"))
    assert not objects.put_if_absent("there", b"other")
    assert objects.read("there") == DATA


@pytest.mark.parametrize("path", ["partNumber=2", "uploadId="])
@pytest.mark.parametrize("kind", ["slow_down", "lost_answer", "cut_request"])
def test_a_large_file_survives(
    kind: str,
    path: str,
    objects: Objects,
    proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "PART", 5 << 20)
    source = tmp_path / "source"
    source.write_bytes(DATA * 130)
    method = "PUT" if path.startswith("part") else "POST"
    proxy.inject(Fault(kind, method, path, after=1000))
    objects.upload(source, "larger")
    assert proxy.injected[kind] == 1
    for answer in ("cut_answer", "short_answer"):
        proxy.inject(Fault(answer, "GET", after=100_000))
        objects.download("larger", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()
        assert proxy.injected[answer] == 1


def test_what_goes_on_is_given_up_in_time(s3_store: StoreConfig, proxy: FaultProxy) -> None:
    objects = open_objects(s3_store.model_copy(update={"endpoint_url": proxy.url, "retry_seconds": 1.5}))
    proxy.inject(Fault("slow_down", times=1000))
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"503 SlowDown") as error:
        objects.read("there")
    seconds = time.monotonic() - started
    assert seconds < 30
    told = re.search(r"(\d+) attempts in (\d+\.\d) s", str(error.value))
    assert told is not None
    assert int(told[1]) == proxy.requests["GET"]
    assert 0 < float(told[2]) <= seconds + 0.05
    assert not isinstance(error.value, MissingError | AccessError)
    assert proxy.requests["GET"] > 2


@pytest.mark.parametrize("verb", VERBS)
def test_not_allowed_for_a_while_is_said_at_once_and_is_not_absence(
    verb: str, objects: Objects, proxy: FaultProxy, tmp_path: Path
) -> None:
    call, expected = VERBS[verb]
    proxy.inject(Fault("forbidden", times=1000))
    with pytest.raises(AccessError):
        call(objects, tmp_path)
    assert proxy.requests.total() == 1
    proxy.clear()
    assert call(objects, tmp_path) == expected


def test_absent_and_taken_are_final_at_once(objects: Objects, proxy: FaultProxy) -> None:
    with pytest.raises(MissingError):
        objects.read("not")
    assert not objects.put_if_absent("there", DATA)
    assert proxy.requests == {"GET": 1, "PUT": 1}


def test_not_allowed_is_no_empty_store(behind: StoreConfig, proxy: FaultProxy) -> None:
    objects = open_objects(behind)
    fill(BlockStore(objects), {"p": range(8)})
    ArtifactStore(objects).commit(RECIPE, {"a": b"1"}, {}, 0)
    proxy.inject(Fault("forbidden", times=1000))
    for call in (
        lambda: BlockStore(objects).plan(RECIPE, {"p": range(8)}, 4),
        lambda: BlockStore(objects).all_recipes(),
        lambda: ArtifactStore(objects).find(RECIPE),
        lambda: list(ArtifactStore(objects).manifests()),
    ):
        with pytest.raises(AccessError):
            call()
    proxy.clear()
    # Nor may a block be quarantined because its data must not be read for a while.
    proxy.inject(Fault("forbidden", path="/rows/", times=1000))
    with pytest.raises(AccessError):
        read(BlockStore(objects), {"p": range(8)})
    proxy.clear()
    assert BlockStore(objects).plan(RECIPE, {"p": range(8)}, 4) == []
    assert list(BlockStore(objects).quarantined()) == []


def test_bytes_hurt_on_the_way_are_read_again(behind: StoreConfig, proxy: FaultProxy) -> None:
    fill(BlockStore(open_objects(behind)), {"p": range(8)}, rows_per_block=8)
    proxy.inject(Fault("hurt_answer", "GET", "/rows/", after=100))
    blocks = BlockStore(open_objects(behind))
    assert read(blocks, {"p": range(8)}).num_rows == 8
    assert proxy.injected == {"hurt_answer": 1}
    assert list(blocks.quarantined()) == []


class TestOldListings:
    """Listings frozen at their first answer, which no real server would do for long."""

    @pytest.fixture
    def blocks(self, behind: StoreConfig, proxy: FaultProxy) -> BlockStore:
        proxy.inject(Fault("old_listing", times=1000))
        blocks = BlockStore(open_objects(behind))
        assert blocks.committed(RECIPE) == []
        return blocks

    def test_own_blocks_are_known_at_once(self, blocks: BlockStore, proxy: FaultProxy) -> None:
        assert fill(blocks, {"p": range(8)}) == 8
        assert fill(blocks, {"p": range(8)}) == 0
        assert read(blocks, {"p": range(8)}).num_rows == 8
        assert proxy.injected["old_listing"] >= 4

    def test_others_blocks_are_not_computed_again(self, blocks: BlockStore, behind: StoreConfig) -> None:
        other = BlockStore(open_objects(behind))
        plans = blocks.plan(RECIPE, {"p": range(8)}, 4)
        assert [blocks.still_missing(plan) for plan in plans] == plans
        commit(other, plans[0])
        assert blocks.still_missing(plans[0]) is None
        # Once told, it stays known: a loop that plans until nothing is missing comes to an end.
        assert blocks.plan(RECIPE, {"p": range(8)}, 4) == plans[1:]

    def test_an_own_block_that_was_quarantined_is_planned_again(
        self, blocks: BlockStore, behind: StoreConfig
    ) -> None:
        fill(blocks, {"p": range(4)})
        other = BlockStore(open_objects(behind))
        other.quarantine(blocks.committed(RECIPE)[0], "for a test")
        assert [plan.rows for plan in blocks.plan(RECIPE, {"p": range(4)}, 4)] == [4]


@pytest.mark.parametrize("seed", [0, 1])
def test_work_goes_on_under_many_faults(s3_endpoint: str, s3_store: StoreConfig, seed: int) -> None:
    with FaultProxy(s3_endpoint, seed) as proxy:
        store = s3_store.model_copy(update={"endpoint_url": proxy.url, "retry_seconds": 20.0})
        for kind in ("slow_down", "cut_request", "lost_answer", "cut_answer", "short_answer"):
            proxy.inject(Fault(kind, times=1000, share=0.05, after=50))
        blocks = BlockStore(open_objects(store))
        wanted = {f"p{i}": range(i % 5 + 1) for i in range(40)}
        assert fill(blocks, wanted, exact=bool(seed)) == sum(map(len, wanted.values()))
        assert BlockStore(open_objects(store)).plan(RECIPE, wanted, 4) == []
        table = read(blocks, wanted)
        done = blocks.compact(RECIPE, 64)
        assert done.after < done.before
        fresh = BlockStore(open_objects(s3_store))
        assert read(fresh, wanted).equals(table)
        assert [check.damage for check in fresh.verify(RECIPE)] == [""] * done.after
        assert list(fresh.quarantined()) == []
        assert min(proxy.injected[kind] for kind in ("slow_down", "lost_answer", "cut_answer")) > 0
