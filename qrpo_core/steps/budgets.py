"""Per-prompt budgets: how many references each prompt shall have, beyond what every prompt has.

A budget belongs to samples and their reward, and lies beside them in the store, so that every run of an
experiment follows it. It only adds: a prompt has the larger of its budget and
`sampling.references_per_prompt`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from qrpo_core.errors import ConfigError, DamagedError, MissingError
from qrpo_core.ids import canonical_json, digest_json
from qrpo_core.objective.planner import Allocation, allocate_references, quantile_standard_error
from qrpo_core.objective.quantiles import RankCounts, leave_one_out_counts
from qrpo_core.objective.transform_base import RewardTransform
from qrpo_core.steps.signal import status_facts, unscored
from qrpo_core.store.objects import Objects
from qrpo_core.store.recipe import Recipe

#: References by prompt_id.
Budget = Mapping[str, int]


def location(samples: Recipe, rewards: Recipe) -> str:
    """Where the budget of samples and their reward lies."""
    return f"budgets/{samples.key}/{rewards.key}.json"


def read(objects: Objects, samples: Recipe, rewards: Recipe) -> dict[str, int]:
    """The budget that was applied, or {}."""
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
    """Put a budget beside its samples, in place of the one that was there."""
    data = {"format": 1, "references": dict(sorted(budget.items()))}
    objects.write(location(samples, rewards), canonical_json(data).encode())


def clear(objects: Objects, samples: Recipe, rewards: Recipe) -> None:
    """Forget the budget; what it has bought stays."""
    objects.delete(location(samples, rewards))


def digest(budget: Budget, count: int) -> str:
    """What names the rows that a budget adds to `count` for every prompt; "" where it adds none."""
    beyond = {prompt: wanted for prompt, wanted in budget.items() if wanted > count}
    return digest_json(beyond) if beyond else ""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scored references of the training prompts, as the planner takes them.

    prompts : prompt_ids; codes index them. counts : rank counts of the references, each left out of its own.
    """

    prompts: list[str]
    codes: Any
    counts: RankCounts

    @classmethod
    def of(cls, rewards: Any) -> Scored:
        """From REWARDS rows. Prompts with fewer than two scored references have no ranks and are left out."""
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
        return cls(prompts.to_pylist(), codes, leave_one_out_counts(codes, values))

    @property
    def sizes(self) -> Any:
        """[prompts] scored references of each."""
        return np.bincount(self.codes, minlength=len(self.prompts))


def share(
    scored: Scored, *, transform: RewardTransform, beta: float, references: int, most: int | None = None
) -> Allocation:
    """Where `references` further references are worth most; at most `most` of them for one prompt."""
    return allocate_references(
        scored.codes,
        scored.counts,
        transform=transform,
        beta=beta,
        budget=references,
        max_per_prompt=most,
    )


def for_precision(scored: Scored, standard_error: float, most: int) -> dict[str, int]:
    """References with which each prompt's quantiles have at most this standard error, as far as `most` goes.

    sqrt(q (1 - q) / n) falls with 1/sqrt(n): n' = n (error now / error wanted)^2, by the least certain of the
    prompt's references (method.md 4). Prompts on which all rewards are equal need none.
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
            # One more, because a reference is ranked among the others.
            wanted[prompt] = min(most, 1 + math.ceil((size - 1) * (error / standard_error) ** 2 - 1e-9))
    return {prompt: count for prompt, count in wanted.items() if count > 0}
