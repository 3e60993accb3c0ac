"""What the next references would buy, and for which prompts: `qrpo budget`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrpo_core.errors import ConfigError
from qrpo_core.objective.planner import (
    marginal_gain,
    objective_facts,
    quantile_standard_error,
    target_standard_error,
)
from qrpo_core.show import duration, table
from qrpo_core.steps import budgets
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.budgets import Scored
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.ranked import shared_transform
from qrpo_core.steps.truncated import training_rewards
from qrpo_core.steps.workspace import Workspace


@dataclass(frozen=True)
class Proposal:
    """A budget and what is to be said of it.

    references : by prompt_id, in all. rows : rows that it adds to what is stored.
    """

    references: Mapping[str, int]
    rows: int
    lines: list[str]


def propose(
    workspace: Workspace,
    *,
    add: int | None = None,
    precision: float | None = None,
    most: int | None = None,
) -> Proposal:
    """A budget from the stored rewards.

    add : further references, shared out to where targets are least certain and near the threshold.
    precision : standard error that every quantile shall have. most : references a prompt, in all.
    """
    for name, value in (("--add", add), ("--most", most)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is refused", remedy="give a number of references, 1 or more")
    samples, rewards = reference_steps(workspace)
    scored = Scored.of(training_rewards(workspace.experiment, rewards))
    have = {prompt: len(rows) for prompt, rows in samples.wanted.items()}
    transform, beta = shared_transform(workspace.experiment.objective), workspace.experiment.objective.beta
    lines = _facts(workspace, scored)
    if precision is not None:
        wanted = budgets.for_precision(scored, precision, most or 10_000)
        grown = {prompt: count for prompt, count in wanted.items() if count > have[prompt]}
        lines.append(f"For a standard error of at most {precision:g} on every quantile:")
    else:
        total = add if add is not None else sum(have.values())
        room = None if most is None else max(0, most - max(have.values()))
        given = budgets.share(scored, transform=transform, beta=beta, references=total, most=room)
        pairs = zip(given.prompt.tolist(), given.additional.tolist(), strict=True)
        grown = {scored.prompts[code]: have[scored.prompts[code]] + more for code, more in pairs if more}
        lines += _gains(scored, workspace, sum(have.values()))
        fall = 1 - given.variance_after / given.variance_before if given.variance_before else 0.0
        lines.append(f"{total:,} further references, given to where they are worth most ({fall:.0%} less):")
    more = {prompt: count - have[prompt] for prompt, count in grown.items()}
    lines += _shares(more, len(have), workspace, samples)
    budget = budgets.read(workspace.objects, samples.recipe, rewards.recipe)
    return Proposal({**budget, **grown}, sum(more.values()), lines)


def _facts(workspace: Workspace, scored: Scored) -> list[str]:
    objective = workspace.experiment.objective
    transform = shared_transform(objective)
    facts = objective_facts(transform, objective.beta)
    errors = quantile_standard_error(scored.counts.below, scored.counts.equal, scored.counts.n)
    nats = target_standard_error(scored.counts, transform=transform, beta=objective.beta)
    free = int(_signal_free(scored).sum())
    rows = [
        ("stored references", f"value (transform {objective.transform}, beta {objective.beta:g})"),
        ("Prompts, scored references", f"{len(scored.prompts):,}, {len(scored.codes):,}"),
        ("References a prompt", f"{scored.sizes.min()} to {scored.sizes.max()}"),
        ("Prompts on which all rewards are equal", f"{free:,}; further references are not given to them"),
        ("Standard error of a quantile", f"{errors.mean():.3f} mean, {errors.max():.3f} largest"),
        ("Standard error of a target", f"{nats.mean():.3g} nats mean, {nats.max():.3g} largest"),
        ("References that are pushed down", f"{facts.pushed_down:.1%}"),
        ("References that resolve the threshold", f"{facts.references_needed:.1f} a prompt"),
    ]
    return [*table(rows), ""]


def _signal_free(scored: Scored) -> Any:
    """[prompts] whether all rewards of a prompt are equal."""
    equal = (scored.counts.equal == scored.counts.n).astype(np.int64)
    return np.bincount(scored.codes, equal) == scored.sizes


def _gains(scored: Scored, workspace: Workspace, stored: int) -> list[str]:
    """What further references buy, for several numbers of them."""
    objective = workspace.experiment.objective
    transform, beta = shared_transform(objective), objective.beta
    signal = ~_signal_free(scored)[scored.codes]
    rows = [("further references", "uncertainty left, where worth most", "the same, shared out evenly")]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        total = max(1, round(factor * stored))
        given = budgets.share(scored, transform=transform, beta=beta, references=total)
        each = total / len(scored.prompts)
        gained = marginal_gain(scored.counts, each, transform=transform, beta=beta)[signal].sum()
        before = given.variance_before or 1.0
        rows.append((f"{total:,}", f"{given.variance_after / before:.1%}", f"{1 - gained / before:.1%}"))
    note = "(variance of the targets, weighted by how near they are to changing sign; in expectation)"
    return [*table(rows), note, ""]


def _shares(more: Mapping[str, int], prompts: int, workspace: Workspace, samples: SampleStep) -> list[str]:
    counts = Counter(more.values())
    rows = [("further references a prompt", "prompts")]
    rows += [(f"{count:,}", f"{counts[count]:,}") for count in sorted(counts)[-8:]]
    if len(counts) > 8:
        smaller = sum(counts[count] for count in sorted(counts)[:-8])
        rows.insert(1, ("fewer", f"{smaller:,}"))
    rows.append(("0", f"{prompts - len(more):,}"))
    rate = workspace.blocks.rate(samples.recipe)
    total = sum(more.values())
    time = (
        ""
        if rate is None or not total
        else f", about {duration(total / rate)} of sampling at the measured rate"
    )
    return [*table(rows), "", f"{total:,} rows in all{time}."]
