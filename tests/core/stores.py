"""What the tests of `qrpo explain`, `ls`, `verify`, `gc` and `compact` share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from qrpo_core.common.schemas import REWARDS
from qrpo_core.config import Experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.maintenance.gc import Garbage, delete, garbage
from qrpo_core.maintenance.in_use import known_prompts
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.workspace import Workspace

NOW = timedelta(seconds=-1)  # older than this: everything
REWARD = {"kind": "length", "min_words": 4, "max_words": 8}


def fill(workspace: Workspace, step: Any) -> None:
    for each in workspace.blocks.plan(step.recipe, step.wanted, 5):
        table, facts = step.compute(each, lambda count: None)
        workspace.blocks.commit(each, table, step.schema, 1.0, **facts)


def of_split(workspace: Workspace, split: str) -> str:
    """Some prompt of a split."""
    return str(prompts.of_split(known_prompts(workspace)[1].prompts, split)["prompt_id"][0].as_py())


def planned(experiment: Experiment) -> list[tuple[str, int, int]]:
    return [(each.stage, each.present, each.missing) for each in plan(Workspace(experiment))]


def collect(*experiments: Experiment, older: timedelta = NOW) -> list[Garbage]:
    return garbage([Workspace(each) for each in experiments], datetime.now(UTC) - older).garbage


def sweep(*experiments: Experiment, older: timedelta = NOW) -> list[Garbage]:
    """Delete what `collect` finds."""
    found = collect(*experiments, older=older)
    assert delete(Workspace(experiments[0]).objects, found) == []
    return found


def files(experiment: Experiment) -> dict[str, int]:
    root = Path(experiment.store.path)
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def flip(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


class Cut(Exception):
    """The crash."""


class Cutting:
    """Objects of a store whose deletions stop after some: a crash."""

    def __init__(self, workspace: Workspace, after: int) -> None:
        self._objects, self._left = workspace.objects, after

    def entries(self, prefix: str) -> Iterator[Any]:
        return self._objects.entries(prefix)

    def delete(self, key: str) -> None:
        if not self._left:
            raise Cut
        self._left -= 1
        self._objects.delete(key)


def reward_rows(reward: float, rows: list[tuple[str, str]]) -> pa.Table:
    """REWARDS rows of prompt a, a (status, detail) each; `reward` where the status is ok."""
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": "a",
                "sample_index": at,
                "ground_truth_digest": "",
                "status": status,
                "detail": detail,
                "reward": reward if status == "ok" else None,
            }
            for at, (status, detail) in enumerate(rows)
        ],
        schema=REWARDS,
    )
