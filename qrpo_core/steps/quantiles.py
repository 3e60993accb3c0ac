"""Rank counts of the training completions among their prompt's references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.quantiles import rank_counts_table
from qrpo_core.records import RANK_COUNTS, REFERENCE_REWARDS, REWARDS
from qrpo_core.steps.blocks import RewardStep
from qrpo_core.steps.tables import to_bytes
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 1


def recipe(prompts: Recipe, rewards: RewardStep) -> Recipe:
    """Decided by which prompts, which rewards and how many references of each."""
    config = {"references_per_prompt": rewards.samples.count}
    return Recipe("quantiles", VERSION, config, {"prompts": prompts.key, "rewards": rewards.recipe.key})


def build(workspace: Workspace, asked: Recipe, rewards: RewardStep) -> Manifest:
    """Commit `rank_counts.parquet` and `reference_rewards.parquet`.

    The training completions are the references themselves, so each is left out of its own comparison
    (method.md 3.2). Rows without a reward and prompts left with fewer than two are counted in the facts.
    """

    def make(scratch: Path) -> Built:
        table = workspace.blocks.read(rewards.recipe, rewards.wanted, REWARDS)
        counts, reference_rewards, facts = rank(table)
        files: dict[str, Path | bytes] = {
            "rank_counts.parquet": to_bytes(counts, RANK_COUNTS, "rank counts"),
            "reference_rewards.parquet": to_bytes(reference_rewards, REFERENCE_REWARDS, "reference rewards"),
        }
        return files, facts

    return workspace.make(asked, make)


def rank(rewards: pa.Table) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """Rank counts and sorted reference rewards of a REWARDS table, and what was left out of them.

    Raises ObjectiveError when no prompt has two scored references.
    """
    status = {row["values"]: row["counts"] for row in rewards.column("status").value_counts().to_pylist()}
    scored = rewards.filter(pc.equal(rewards.column("status"), "ok"))
    codes, values, ids, order = _grouped(scored)
    per_prompt = np.bincount(codes, minlength=len(ids))
    keep = per_prompt[codes] >= 2
    too_few = int((per_prompt < 2).sum()) + _prompts(rewards) - len(ids)
    if not keep.any():
        raise ObjectiveError(
            "no prompt has two scored references",
            where=f"{len(rewards)} rewards, by status {status}",
            remedy="raise sampling.references_per_prompt to 2 or more, or look at the rows' details",
        )
    codes, values, order = codes[keep], values[keep], order[keep]
    result = rank_counts_table(codes, values, codes, values, in_pool=True)
    rows = scored.take(pa.array(order))
    counts = pa.table(
        {
            "prompt_id": rows.column("prompt_id"),
            "sample_index": rows.column("sample_index"),
            "reward": pa.array(values),
            "below": pa.array(result.below),
            "equal": pa.array(result.equal),
            "n": pa.array(result.n),
            "in_pool": pa.array(np.ones(len(values), bool)),
        }
    )
    facts = {
        "status": status,
        "prompts": int((per_prompt >= 2).sum()),
        "rows": len(values),
        "prompts_left_out": too_few,
    }
    return counts, _reference_rewards(codes, values, ids), facts


def _prompts(rewards: pa.Table) -> int:
    return len(pc.unique(rewards.column("prompt_id")))


def _grouped(scored: pa.Table) -> tuple[Any, Any, list[str], Any]:
    """Per row, sorted by prompt: integer code and reward; the prompts' ids; the rows' order in the table."""
    encoded = scored.column("prompt_id").combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    order = np.argsort(codes, kind="stable")
    values = scored.column("reward").to_numpy().astype(np.float64)
    return codes[order], values[order], encoded.dictionary.to_pylist(), order


def _reference_rewards(codes: Any, values: Any, ids: list[str]) -> pa.Table:
    order = np.lexsort((values, codes))
    used, first = np.unique(codes, return_index=True)
    offsets = pa.array(np.append(first, len(codes)), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(values[order]))
    return pa.table({"prompt_id": [ids[code] for code in used], "rewards": lists})
