"""The manifest of a block: what its creation under ``index/`` makes real."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from qrpo_core import __version__
from qrpo_core.errors import DamagedError, StoreError
from qrpo_core.ids import canonical_json
from qrpo_core.store.planning import BlockPlan, Run, Runs, block_id, subtract

#: Of a manifest whose rows are all settled and of generation 1, and of any other: what reads the first alone
#: must not take the second for it.
FORMAT, FORMAT_OF_PASSING = 1, 2


class Passing(NamedTuple):
    """Rows first .. first + count - 1 of one row key, whose status can pass.

    tries : how often they were asked for, in this block and in those that were merged into it.
    """

    key: str
    first: int
    count: int  # type: ignore[assignment]  # in place of tuple's method of that name
    tries: int
    status: str


#: Fact of a block of few rows, made to see that they can be: its rate says nothing of a full one.
TRIAL = "trial"


@dataclass(frozen=True)
class BlockManifest:
    """A committed block: its rows, its data object and how it came about.

    file : object key of the Parquet data; digest, bytes : of that object.
    seconds : what computing the rows took. created : by the clock of who made it; it decides nothing.
    passing : those of its rows that are asked for again. generation : see `BlockPlan`.
    """

    block: str
    runs: Runs
    rows: int
    file: str
    digest: str
    bytes: int
    seconds: float
    created: str
    code: str
    facts: dict[str, Any] = field(default_factory=dict)
    passing: tuple[Passing, ...] = ()
    generation: int = 1

    @property
    def step(self) -> str:
        """Name of the step."""
        return self.file.split("/")[1]

    @property
    def key(self) -> str:
        """Key of the recipe."""
        return self.file.split("/")[2]

    @property
    def index(self) -> str:
        """Object key of the manifest itself."""
        return f"blocks/{self.step}/{self.key}/index/{self.block}.json"

    @property
    def exact(self) -> bool:
        """Whether the step declares that these rows come out the same wherever they are computed."""
        return self.facts.get("exact") is True


def make_manifest(
    plan: BlockPlan,
    digest: str,
    size: int,
    seconds: float,
    facts: dict[str, Any],
    passing: Iterable[Passing] = (),
) -> BlockManifest:
    """The manifest of a plan's rows, now stored as `size` bytes with this digest."""
    return BlockManifest(
        block=plan.id,
        runs=Runs(plan.runs),
        rows=plan.rows,
        file=f"{plan.recipe.blocks_path}/rows/{digest[:32]}.parquet",
        digest=digest,
        bytes=size,
        seconds=round(seconds, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code=__version__,
        facts=facts,
        passing=tuple(passing),
        generation=plan.generation,
    )


def to_json(manifest: BlockManifest) -> bytes:
    """The manifest as it is stored."""
    raw = {each.name: getattr(manifest, each.name) for each in fields(manifest)}
    raw["runs"] = list(manifest.runs)
    if not manifest.passing and manifest.generation == 1:
        del raw["passing"], raw["generation"]
        return canonical_json(raw | {"format": FORMAT}).encode()
    return canonical_json(raw | {"format": FORMAT_OF_PASSING}).encode()


def from_json(data: bytes, index: str, where: str) -> BlockManifest:
    """A stored manifest, from the object `index`. DamagedError if it is none, or not of that name and rows.

    The block's name is a digest of its rows, so a manifest that was hurt cannot claim rows it never had.
    """
    try:
        raw = orjson.loads(data)
        if raw.pop("format") not in (FORMAT, FORMAT_OF_PASSING):
            raise StoreError("block manifest of another format", where=where, remedy="upgrade qrpo")
        _, step, key, _, name = index.split("/")
        if (
            f"{block_id(key, raw['runs'], raw.get('generation', 1))}.json" != name
            or raw["block"] + ".json" != name
        ):
            raise ValueError("its rows are not those it is named by")
        raw["runs"] = Runs(raw["runs"])
        raw["passing"] = tuple(Passing(*each) for each in raw.get("passing", ()))
        manifest = BlockManifest(**raw)
        if manifest.rows != int(manifest.runs.count.sum()) or (manifest.step, manifest.key) != (step, key):
            raise ValueError("it contradicts itself")
        passing = Runs(Run(each.key, each.first, each.count) for each in manifest.passing)
        if subtract(passing, [manifest]) or any(each.tries < 1 for each in manifest.passing):
            raise ValueError("rows that can pass are not among its rows")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(
            f"unreadable manifest: {error}", where=where, remedy="set it aside (qrpo verify --repair)"
        ) from None
