"""The rank counts and references of a stored training set as arrays, and the targets from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.hashing import tie_seed
from qrpo_core.config import ObjectiveConfig
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective_kinds import make_objective
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective, TargetObjective


def target_objective(config: ObjectiveConfig) -> TargetObjective:
    """The objective of a configuration that `has_targets`."""
    made = make_objective(config)
    if not isinstance(made, TargetObjective):
        raise AssertionError(f"objective {config.kind!r} has no targets")
    return made


def planning_ratio(config: ObjectiveConfig) -> DensityRatio:
    """The density ratio by which budgets are planned, the same for all prompts.

    Raises ConfigError for an objective whose targets are not of the quantile.
    """
    made = make_objective(config)
    if isinstance(made, QuantileObjective):
        return made.ratio()
    why = "fits rewards and ranks nothing: its references only estimate V"
    if not config.has_targets:
        why = "compares completions and ranks nothing"
    raise ConfigError(
        f"a budget is planned by the quantiles' errors, and objective.kind {config.kind!r} {why}",
        where="objective.kind",
        remedy="set sampling.references_per_prompt for all prompts",
    )


def ranked_pool(table: pa.Table, references: pa.Table, objective: ObjectiveConfig) -> Pool:
    """The training completions and their references as arrays; prompts are rows of `references`.

    table : TRAINING_SET rows. references : REFERENCE_REWARDS rows of all their prompts.
    """
    lists = references["rewards"].combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    codes = pc.index_in(table["prompt_id"], value_set=references["prompt_id"]).to_numpy().astype(np.int64)
    keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    names = zip(references["prompt_id"].to_pylist(), sizes.tolist(), strict=True)
    of_references = ((prompt, at) for prompt, size in names for at in range(size))
    return Pool(
        codes=codes,
        rewards=table["reward"].to_numpy().astype(np.float64),
        reference_codes=np.repeat(np.arange(len(references)), sizes),
        reference_rewards=lists.flatten().to_numpy(zero_copy_only=False),
        in_pool=bool(pc.all(table["in_pool"]).as_py()),
        counts=RankCounts(*(table[name].to_numpy() for name in ("below", "equal", "n"))),
        lengths=pc.list_value_length(table["token_ids"]).to_numpy().astype(np.int64),
        seeds=_seeds(keys),
        reference_seeds=_seeds(of_references) if objective.tie_method == "randomized" else None,
    )


def _seeds(keys: Any) -> Any:
    return np.array([tie_seed(*key) for key in keys], np.uint64)
