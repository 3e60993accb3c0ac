"""Per-prompt budgets: a number of references for single prompts.

A prompt gets the larger of its budget and `sampling.references_per_prompt`. The store keeps a budget under
the recipes of the samples and of their reward, so every run of the experiment uses it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from qrpo_core.common.errors import ConfigError, DamagedError, MissingError
from qrpo_core.common.hashing import canonical_json, digest_json
from qrpo_core.objective.allocation import Allocation, allocate_references, quantile_standard_error
from qrpo_core.objective.quantiles import RankCounts, leave_one_out_counts
from qrpo_core.objective.transforms import RewardTransform
from qrpo_core.pipeline.learning_signal import status_facts, unscored
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.recipe import Recipe

#: Number of references by prompt_id.
Budget = Mapping[str, int]


def location(samples: Recipe, rewards: Recipe) -> str:
    """The budget's key in the store."""
    return f"budgets/{samples.key}/{rewards.key}.json"


def read(objects: Objects, samples: Recipe, rewards: Recipe) -> dict[str, int]:
    """The stored budget, or {}. Raises DamagedError if it cannot be read."""
    key = location(samples, rewards)
    try:
        found = json.loads(objects.read(key))["references"]
        return {str(prompt): int(count) for prompt, count in found.items()}
    except MissingError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"not a budget ({error})", where=f"{objects.url}/{key}", remedy="qrpo budget --clear"
        ) from None


def write(objects: Objects, samples: Recipe, rewards: Recipe, budget: Budget) -> None:
    """Store a budget in place of the stored one."""
    data = {"format": 1, "references": dict(sorted(budget.items()))}
    objects.write(location(samples, rewards), canonical_json(data).encode())


def clear(objects: Objects, samples: Recipe, rewards: Recipe) -> None:
    """Delete the budget. The references that were drawn for it stay."""
    objects.delete(location(samples, rewards))


def digest(budget: Budget, count: int) -> str:
    """A digest of the prompts whose budget is above `count`, with their budgets; "" if there is none."""
    beyond = {prompt: wanted for prompt, wanted in budget.items() if wanted > count}
    return digest_json(beyond) if beyond else ""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scored references of the training prompts as arrays, the input of `objective.allocation`.

    prompts : prompt_ids. codes : [references] each one's index in `prompts`.
    counts : rank counts [references] among the other references of the prompt.
    rows : the references, in this order, with the columns of the REWARDS rows that they come from.
    """

    prompts: list[str]
    codes: Any
    counts: RankCounts
    rows: Any

    @classmethod
    def of(cls, rewards: Any) -> Scored:
        """The scored references among REWARDS rows, without prompts that have fewer than two.

        Raises MissingError if no prompt has two.
        """
        scored = rewards.filter(pc.equal(rewards["status"], "ok"))
        counted = scored["prompt_id"].value_counts()
        enough = counted.filter(pc.greater_equal(counted.field("counts"), 2)).field("values")
        scored = scored.filter(pc.is_in(scored["prompt_id"], value_set=enough))
        if not len(scored):
            raise MissingError(
                "no prompt has two scored references yet",
                where=unscored(status_facts(rewards)) or "budget",
                remedy="see to the rows without a reward" if len(rewards) else "run precompute first",
            )
        prompts = pc.unique(scored["prompt_id"])
        codes = pc.index_in(scored["prompt_id"], value_set=prompts).to_numpy().astype(np.int64)
        values = scored["reward"].to_numpy().astype(np.float64)
        return cls(prompts.to_pylist(), codes, leave_one_out_counts(codes, values), scored)

    @property
    def sizes(self) -> Any:
        """The number of scored references of each prompt, [prompts]."""
        return np.bincount(self.codes, minlength=len(self.prompts))


def share(
    scored: Scored, *, transform: RewardTransform, beta: float, references: int, most: int | None = None
) -> Allocation:
    """`references` further references, divided among the prompts; at most `most` for each.

    See `objective.allocation.allocate_references`.
    """
    return allocate_references(
        scored.codes,
        scored.counts,
        transform=transform,
        beta=beta,
        budget=references,
        max_per_prompt=most,
    )


def for_precision(scored: Scored, standard_error: float, most: int) -> dict[str, int]:
    """The number of references that brings each prompt's quantiles to a standard error, at most `most`.

    The standard error sqrt(q (1 - q) / n) falls with 1/sqrt(n), so n' = n (error now / wanted error)^2, for
    the largest error among the prompt's references (docs/reference/method.md, section 4). Prompts that have
    the wanted error already are left out, among them those with equal rewards.
    """
    if not 0 < standard_error < 0.5:
        raise ConfigError(
            f"a standard error of {standard_error} cannot be aimed at", remedy="between 0 and 0.5"
        )
    errors = quantile_standard_error(scored.counts.below, scored.counts.equal, scored.counts.n)
    worst = np.zeros(len(scored.prompts))
    np.maximum.at(worst, scored.codes, errors)
    wanted: dict[str, int] = {}
    for prompt, size, error in zip(scored.prompts, scored.sizes.tolist(), worst.tolist(), strict=True):
        if error > standard_error:
            # One more than n: a reference is ranked among the others.
            wanted[prompt] = min(most, 1 + math.ceil((size - 1) * (error / standard_error) ** 2 - 1e-9))
    return {prompt: count for prompt, count in wanted.items() if count > 0}
