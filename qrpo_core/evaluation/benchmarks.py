"""The result of a benchmark: both policies on prompts of its own, compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import with_config

from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import RewardedPair
from qrpo_core.evaluation.metrics import bootstrap, prompt_means, side_summary
from qrpo_core.evaluation.plain import PlainResult
from qrpo_core.evaluation.results import Estimate, SideSummary

#: A reward from here on is the full one of the kinds in FULL_REWARD: rewards are sums of fractions.
_FULL = 1 - 1e-9

#: Kinds of reward whose full reward is 1, and means that the task is solved.
FULL_REWARD = ("number", "exact", "math", "reasoning_gym", "code")


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class BenchmarkResult(PlainResult):
    """The comparison of two policies on a benchmark.

    kind : of its reward. prompts : those with an ok reward on both sides; left_out counts the others.
    trained_on : how many of its prompts are also prompts of the training.
    before, after : mean over prompts of the prompt's mean reward, lengths, and rows without a reward.
    difference : after - before, paired by prompt.
    solved_before, solved_after, solved_difference : the same of the share of completions with the full
        reward; None for kinds of reward without one.
    alpaca_eval : the package's metrics by side ("before", "after"), in percent; empty for other kinds.
    """

    what, remedy = "a benchmark's result", "evaluate again"

    kind: str
    prompts: int
    left_out: dict[str, int]
    trained_on: int
    before: SideSummary
    after: SideSummary
    difference: Estimate
    solved_before: Estimate | None
    solved_after: Estimate | None
    solved_difference: Estimate | None
    alpaca_eval: dict[str, dict[str, float]]


def evaluate_benchmark(
    before: pa.Table,
    after: pa.Table,
    config: EvaluationConfig,
    *,
    name: str,
    kind: str,
    trained_on: int = 0,
    alpaca_eval: Mapping[str, Mapping[str, float]] | None = None,
) -> BenchmarkResult:
    """The comparison of both policies' completions of a benchmark, each EVALUATED rows.

    Intervals as in `evaluation.metrics`. Raises DataError where no prompt has an ok reward on both sides.
    """
    pair = RewardedPair(before, after, f"benchmark {name}")
    means = prompt_means(pair)
    rows = [means.before, means.after, means.difference]
    if kind in FULL_REWARD:
        solved = prompt_means(RewardedPair(_solved(before), _solved(after), pair.where))
        rows += [solved.before, solved.after, solved.difference]
    reward_before, reward_after, difference, *shares = bootstrap(np.stack(rows), config)
    solved_before, solved_after, solved_difference = shares or (None, None, None)
    return BenchmarkResult(
        kind=kind,
        prompts=len(means.prompt_ids),
        left_out=means.left_out,
        trained_on=trained_on,
        before=side_summary(pair.before, reward_before),
        after=side_summary(pair.after, reward_after),
        difference=difference,
        solved_before=solved_before,
        solved_after=solved_after,
        solved_difference=solved_difference,
        alpaca_eval={side: dict(found) for side, found in (alpaca_eval or {}).items()},
    )


def _solved(table: pa.Table) -> pa.Table:
    """The rows with 1 as the reward of those with the full reward, and 0 of the others."""
    full = pc.cast(pc.greater_equal(table["reward"], _FULL), pa.float64())
    return table.set_column(table.column_names.index("reward"), "reward", full)
