"""The manifest of a block; its creation under ``index/`` makes the block real."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from qrpo_core import __version__
from qrpo_core.common.errors import DamagedError
from qrpo_core.common.hashing import canonical_json
from qrpo_core.store.blocks.planning import BlockPlan, RowRange, RowRanges, block_id, subtract
from qrpo_core.store.manifest import check_format

FORMAT = 3


class RetryableRange(NamedTuple):
    """Rows first .. first + count - 1 of one row key, all with one retryable status.

    tries : how often they were computed, in this block and in those that were merged into it.
    """

    key: str
    first: int
    count: int  # type: ignore[assignment]  # in place of tuple's method of that name
    tries: int
    status: str


#: Fact of a block of few rows, computed as a trial: its rate says nothing of a full block.
TRIAL = "trial"


@dataclass(frozen=True)
class BlockManifest:
    """A committed block: its rows, its data object and where it comes from.

    file : object key of the Parquet data; digest, bytes : of that object.
    seconds : time to compute the rows. created : by the clock of the machine that made it; it decides
    nothing.
    retryable : its rows with a retryable status. generation : see `BlockPlan`.
    """

    block: str
    ranges: RowRanges
    rows: int
    file: str
    digest: str
    bytes: int
    seconds: float
    created: str
    code: str
    facts: dict[str, Any] = field(default_factory=dict)
    retryable: tuple[RetryableRange, ...] = ()
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
    def manifest_key(self) -> str:
        """Object key of the manifest itself."""
        return f"blocks/{self.step}/{self.key}/index/{self.block}.json"

    @property
    def exact(self) -> bool:
        """Whether the step declares that these rows are the same wherever they are computed."""
        return self.facts.get("exact") is True


def make_manifest(
    plan: BlockPlan,
    digest: str,
    size: int,
    seconds: float,
    facts: dict[str, Any],
    retryable: Iterable[RetryableRange] = (),
) -> BlockManifest:
    """The manifest of a plan's rows, now stored as `size` bytes with this digest."""
    return BlockManifest(
        block=plan.id,
        ranges=RowRanges(plan.ranges),
        rows=plan.rows,
        file=f"{plan.recipe.blocks_path}/rows/{digest[:32]}.parquet",
        digest=digest,
        bytes=size,
        seconds=round(seconds, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code=__version__,
        facts=facts,
        retryable=tuple(retryable),
        generation=plan.generation,
    )


def to_json(manifest: BlockManifest) -> bytes:
    """The manifest as it is stored."""
    raw = {each.name: getattr(manifest, each.name) for each in fields(manifest)}
    return canonical_json(raw | {"ranges": list(manifest.ranges), "format": FORMAT}).encode()


def from_json(data: bytes, manifest_key: str, where: str) -> BlockManifest:
    """The stored manifest of that object key. DamagedError if it is unreadable or names other rows.

    The block's name is a digest of its rows, so a damaged manifest cannot claim rows that it never had.
    """
    try:
        raw = orjson.loads(data)
        check_format(raw.pop("format"), FORMAT, where)
        _, step, key, _, name = manifest_key.split("/")
        if not name == f"{raw['block']}.json" == f"{block_id(key, raw['ranges'], raw['generation'])}.json":
            raise ValueError("its name does not fit its rows")
        raw["ranges"] = RowRanges(raw["ranges"])
        raw["retryable"] = tuple(RetryableRange(*each) for each in raw["retryable"])
        manifest = BlockManifest(**raw)
        if manifest.rows != int(manifest.ranges.count.sum()) or (manifest.step, manifest.key) != (step, key):
            raise ValueError("it contradicts itself")
        retryable = RowRanges(RowRange(each.key, each.first, each.count) for each in manifest.retryable)
        if subtract(retryable, [manifest]) or any(each.tries < 1 for each in manifest.retryable):
            raise ValueError("its retryable rows are not among its rows")
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedError(
            f"unreadable manifest: {error}", where=where, remedy="quarantine it (qrpo verify --repair)"
        ) from None
