"""A stored training set's rank counts and references as arrays, ready for any normaliser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import ObjectiveConfig
from qrpo_core.ids import tie_seed
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.targets import CalibratedTargets, calibrated_targets, reference_targets
from qrpo_core.objective.transform_base import RewardTransform
from qrpo_core.objective.transforms import get_transform


def fewest_references(objective: ObjectiveConfig) -> int:
    """Scored references a prompt with which the objective can be computed, whatever the normaliser.

    One more than the transform needs, because one is left out when references are ranked among themselves.
    """
    return 1 + max(1, _transform(objective, np.zeros(1), np.ones(1, np.int64)).min_references)


def shared_transform(objective: ObjectiveConfig) -> RewardTransform:
    """The transform where one is wanted for all prompts: normal in place of scaled_normal."""
    if objective.transform == "scaled_normal":
        return get_transform("normal")
    return _transform(objective, np.zeros(1), np.ones(1, np.int64))


def _transform(objective: ObjectiveConfig, rewards: Any, sizes: Any) -> RewardTransform:
    """f. rewards [references] by prompt, sizes [prompts]; used by scaled_normal alone.

    There it is the mean and the standard deviation (n - 1 below) of each prompt's own references.
    """
    if objective.transform == "power":
        return get_transform("power", exponent=objective.exponent)
    if objective.transform != "scaled_normal":
        return get_transform(objective.transform)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    mean = np.bincount(codes, rewards) / sizes
    square = np.bincount(codes, (rewards - mean[codes]) ** 2)
    return get_transform("scaled_normal", mean=mean, std=np.sqrt(square / np.maximum(sizes - 1, 1)))


@dataclass(frozen=True, eq=False)
class Ranked:
    """Training completions [rows] and the references [references] that they are ranked among.

    codes, reference_codes : the prompt of each, as a row number of the references' table.
    in_pool : whether the training completions are themselves references.
    lengths : completion tokens [rows]. seeds, reference_seeds : uint64, from the rows' ids.
    """

    objective: ObjectiveConfig
    transform: RewardTransform
    codes: Any
    reference_codes: Any
    reference_rewards: Any
    in_pool: bool
    counts: RankCounts
    lengths: Any
    seeds: Any
    reference_seeds: Any

    @classmethod
    def of(cls, table: pa.Table, references: pa.Table, objective: ObjectiveConfig) -> Ranked:
        """table : TRAINING_SET rows. references : REFERENCE_REWARDS rows of all of their prompts."""
        lists = references["rewards"].combine_chunks()
        sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        rewards = lists.flatten().to_numpy(zero_copy_only=False)
        codes = pc.index_in(table["prompt_id"], value_set=references["prompt_id"]).to_numpy().astype(np.int64)
        keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        names = zip(references["prompt_id"].to_pylist(), sizes.tolist(), strict=True)
        of_references = ((prompt, at) for prompt, size in names for at in range(size))
        return cls(
            objective=objective,
            transform=_transform(objective, rewards, sizes),
            codes=codes,
            reference_codes=np.repeat(np.arange(len(references)), sizes),
            reference_rewards=rewards,
            in_pool=bool(pc.all(table["in_pool"]).as_py()),
            counts=RankCounts(*(table[name].to_numpy() for name in ("below", "equal", "n"))),
            lengths=pc.list_value_length(table["token_ids"]).to_numpy().astype(np.int64),
            seeds=_seeds(keys),
            reference_seeds=_seeds(of_references) if objective.convention == "randomized" else None,
        )

    def targets(self, **how: Any) -> CalibratedTargets:
        """Calibrated targets of the training completions. how : normaliser and tie_tolerance."""
        objective = self.objective
        return calibrated_targets(
            self.counts,
            transform=self.transform,
            beta=objective.beta,
            convention=objective.convention,
            prompt=self.codes,
            reference_prompt=self.reference_codes,
            reference_rewards=self.reference_rewards,
            seeds=self.seeds,
            reference_seeds=self.reference_seeds,
            lengths=self.lengths if objective.beta_scale == "by_length" else None,
            beta_max=objective.beta_max,
            **how,
        )

    def of_references(self, **how: Any) -> CalibratedTargets:
        """The same of the references, each left out of its own ranking; at constant beta."""
        return reference_targets(
            self.reference_codes,
            self.reference_rewards,
            transform=self.transform,
            beta=self.objective.beta,
            convention=self.objective.convention,
            reference_seeds=self.reference_seeds,
            **how,
        )


def _seeds(keys: Any) -> Any:
    return np.array([tie_seed(*key) for key in keys], np.uint64)
