"""Rank counts of training completions: their prompt's references with a smaller and with an equal reward.

The store has the counts. A quantile follows from them with the tie method (`objective.quantiles`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import PAIRS, RANK_COUNTS, REFERENCE_REWARDS
from qrpo_core.config import cache_key_fields
from qrpo_core.objective.quantiles import rank_counts_table
from qrpo_core.pipeline import learning_signal
from qrpo_core.pipeline.completions import OfflineCompletions, Rewards
from qrpo_core.pipeline.selection import Selection, select
from qrpo_core.pipeline.truncated import cut_facts, require_whole, training_rewards
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 3


def recipe(
    workspace: Workspace,
    prompts: Recipe,
    rewards: Rewards,
    references: Rewards | None,
    left_out: str = "",
    own: Rewards | None = None,
) -> Recipe:
    """The recipe of rank counts: the prompts, the rewards, the selection, and the references.

    rewards, references : the same object where the training completions are the references themselves.
    left_out : names the training prompts and completions that are left out.
    own : of the data set's completions, in mode mixed.

    Retryable rows are in the recipe: once one gets a reward, the counts change.
    """
    config: dict[str, Any] = {
        "training_data": cache_key_fields(workspace.experiment.decided_data),
        "rows": rewards.completions.extent,
        "references": None if references is None else references.completions.extent,
    }
    if left_out:
        config["left_out"] = left_out
    if rewards.retryable_digest:
        config["retryable"] = rewards.retryable_digest
    if references is not None and references is not rewards and references.retryable_digest:
        config["retryable_references"] = references.retryable_digest
    keys = {"prompts": prompts.key, "rewards": rewards.recipe.key}
    if own is not None:
        keys["own"] = own.recipe.key
        if own.retryable_digest:
            config["retryable_own"] = own.retryable_digest
    if references is not None:
        keys["references"] = references.recipe.key
    return Recipe("quantiles", VERSION, config, keys)


def build(
    workspace: Workspace,
    quantiles_recipe: Recipe,
    rewards: Rewards,
    references: Rewards | None,
    own: Rewards | None = None,
) -> Manifest:
    """Commit `rank_counts.parquet`, `pairs.parquet` and `reference_rewards.parquet`.

    A training completion that is itself a reference is left out of its own comparison
    (docs/reference/method.md, section 3.2). Rows without a reward and prompts left with fewer than two
    references are counted in the facts.
    """

    def make(scratch: Path) -> Built:
        completions = rewards.completions
        offline = completions.rows if isinstance(completions, OfflineCompletions) else None
        experiment = workspace.experiment
        table, others = training_rewards(experiment, rewards), None
        if references is not None:
            others = table if references is rewards else training_rewards(experiment, references)
        require_whole(experiment, table)
        data = experiment.decided_data
        statuses = {"statuses": learning_signal.status_facts(table)}
        if others is not None and others is not table:
            statuses["reference_statuses"] = learning_signal.status_facts(others)
        given = None if own is None else training_rewards(experiment, own)
        if given is not None:
            statuses["own_statuses"] = learning_signal.status_facts(given)
        chosen = select(data, table, others, offline=offline, own=given)
        failed = "; ".join(filter(None, (learning_signal.unscored(each) for each in statuses.values())))
        counts, reference_rewards, pairs, facts = rank(chosen, failed)
        facts |= (
            statuses
            | {"remarked": learning_signal.remarked(table)}
            | {"preference": data.preference}
            | cut_facts(experiment, table, others)
        )
        facts["prompts_left_out"] = completions.prompts.num_rows - facts["prompts"]
        files: dict[str, Path | bytes] = {
            "rank_counts.parquet": as_parquet(counts, RANK_COUNTS, "rank counts"),
            "pairs.parquet": as_parquet(pairs, PAIRS, "pairs"),
            "reference_rewards.parquet": as_parquet(
                reference_rewards, REFERENCE_REWARDS, "reference rewards"
            ),
        }
        return files, facts

    return workspace.make(quantiles_recipe, make)


def rank(chosen: Selection, failed: str = "") -> tuple[pa.Table, pa.Table, pa.Table, dict[str, Any]]:
    """Rank counts of the selected rows, sorted rewards of each prompt's references, pairs, and facts.

    Prompts with fewer than two references are left out, since a lone reference cannot be ranked.
    failed : the statuses of rows without a reward, for the error.

    Raises ObjectiveError when no prompt is left.
    """
    rows, pairs, references = chosen.rows, chosen.pairs, chosen.references
    in_pool = np.broadcast_to(chosen.in_pool, len(rows))
    if references is not None:
        counted = references["prompt_id"].value_counts()
        enough = counted.filter(pc.greater_equal(counted.field("counts"), 2)).field("values")
        in_pool = in_pool[pc.is_in(rows["prompt_id"], value_set=enough).to_numpy()]
        rows, pairs, references = (
            table.filter(pc.is_in(table["prompt_id"], value_set=enough))
            for table in (rows, pairs, references)
        )
    if not len(rows):
        raise ObjectiveError(
            "no prompt has a scored completion and two scored references",
            where=f"{len(chosen.rows)} scored completions, "
            f"{0 if chosen.references is None else len(chosen.references)} scored references",
            remedy=f"see to the rows without a reward: {failed}"
            if failed
            else "raise sampling.references_per_prompt to 2 or more",
        )
    ids = pc.unique(rows["prompt_id"])
    codes = _codes(rows, ids)
    values = rows["reward"].to_numpy().astype(np.float64)
    if references is None:
        below = equal = n = np.zeros(len(rows), np.int64)
        reference_rewards = REFERENCE_REWARDS.empty_table()
    else:
        references = references.filter(pc.is_in(references["prompt_id"], value_set=ids))
        reference_codes = _codes(references, ids)
        reference_values = references["reward"].to_numpy().astype(np.float64)
        result = rank_counts_table(codes, values, reference_codes, reference_values, in_pool)
        below, equal, n = result.below, result.equal, result.n
        reference_rewards = _reference_rewards(reference_codes, reference_values, ids)
    counts = pa.table(
        {
            "prompt_id": rows["prompt_id"],
            "sample_index": rows["sample_index"],
            "reward": rows["reward"],
            "below": pa.array(below),
            "equal": pa.array(equal),
            "n": pa.array(n),
            "in_pool": pa.array(in_pool),
        }
    )
    facts = {"prompts": len(ids), "rows": len(rows), "pairs": len(pairs), **_signal(rows, references)}
    if not isinstance(chosen.in_pool, bool):
        facts["sources"] = {"samples": int(in_pool.sum()), "data_set": int((~in_pool).sum())}
    return counts, reference_rewards, pairs, facts | chosen.facts


def _signal(rows: pa.Table, references: pa.Table | None) -> dict[str, Any]:
    """The number of prompts with unequal rewards, references included, and the range of all rewards."""
    together = [table.select(["prompt_id", "reward"]) for table in (rows, references) if table is not None]
    rewards = pa.concat_tables(together).filter(pc.field("reward").is_valid())
    ends = rewards.group_by("prompt_id").aggregate([("reward", "min"), ("reward", "max")])
    differ = pc.sum(pc.not_equal(ends["reward_min"], ends["reward_max"])).as_py() or 0
    low, high = (pc.min_max(rewards["reward"]).as_py()[end] for end in ("min", "max"))
    return {"prompts_with_signal": differ, "reward_range": None if low is None else [low, high]}


def _codes(table: pa.Table, ids: pa.Array) -> Any:
    return pc.index_in(table["prompt_id"], value_set=ids).to_numpy().astype(np.int64)


def _reference_rewards(codes: Any, values: Any, ids: pa.Array) -> pa.Table:
    order = np.lexsort((values, codes))
    offsets = np.append(0, np.cumsum(np.bincount(codes, minlength=len(ids))))
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values[order]))
    return pa.table({"prompt_id": ids, "rewards": lists})
