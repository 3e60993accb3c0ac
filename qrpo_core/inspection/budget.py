"""`qrpo budget`: which prompts gain most from further references, and how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.formatting import duration
from qrpo_core.objective.allocation import (
    SURE,
    marginal_gain,
    objective_facts,
    quantile_standard_error,
    target_standard_error,
)
from qrpo_core.objective_kinds import make_objective
from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.budgets import Scored
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.ranked import planning_ratio
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.truncated import training_rewards
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.text_table import table


@dataclass(frozen=True)
class Proposal:
    """A proposed budget and its explanation.

    references : total by prompt_id. rows : rows that it adds to the stored ones.
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
    """The budget that the stored rewards suggest.

    add : number of further references; prompts with the least certain targets near the threshold get them.
    precision : largest standard error of a quantile. most : largest total of references a prompt.
    """
    for name, value in (("--add", add), ("--most", most)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is refused", remedy="give a number of references, 1 or more")
    ratio = planning_ratio(workspace.experiment.objective)
    samples, rewards = reference_steps(workspace)
    scored = Scored.of(training_rewards(workspace.experiment, rewards))
    have = {prompt: len(rows) for prompt, rows in samples.wanted.items()}
    transform, beta = ratio.transform, ratio.beta
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
        lines.append(
            f"{total:,} further references, given where they are worth most ({fall:.0%} less uncertainty):"
        )
    more = {prompt: count - have[prompt] for prompt, count in grown.items()}
    lines += _shares(more, len(have), workspace, samples)
    budget = budgets.read(workspace.objects, samples.recipe, rewards.recipe)
    return Proposal({**budget, **grown}, sum(more.values()), lines)


def _facts(workspace: Workspace, scored: Scored) -> list[str]:
    ratio = planning_ratio(workspace.experiment.objective)
    transform, beta = ratio.transform, ratio.beta
    facts = objective_facts(transform, beta)
    errors = quantile_standard_error(scored.counts.below, scored.counts.equal, scored.counts.n)
    of_target = target_standard_error(scored.counts, transform=transform, beta=beta)
    what = _fitted(workspace)
    unit, shown = (" nats", of_target) if what == "target" else ("", beta * of_target)
    free = int(_signal_free(scored).sum())
    upper = 0.5 * (1.0 + facts.pushed_down)
    rows = [
        ("stored references", f"value (transform {transform.name}, beta {beta:g})"),
        ("Prompts, scored references", f"{len(scored.prompts):,}, {len(scored.codes):,}"),
        ("References a prompt", f"{scored.sizes.min()} to {scored.sizes.max()}"),
        ("Prompts on which all rewards are equal", f"{free:,}; further references are not given to them"),
        ("Standard error of a quantile", f"{errors.mean():.3f} mean, {errors.max():.3f} largest"),
        (f"Standard error of a {what}", f"{shown.mean():.3g}{unit} mean, {shown.max():.3g} largest"),
        ("References that are pushed down", f"{facts.pushed_down:.1%}"),
        (
            f"References for the right sign (probability {SURE:g}, quantile {upper:.3f})",
            f"{facts.references_needed:,.0f} to compare with",
        ),
    ]
    return [*table(rows), ""]


def _fitted(workspace: Workspace) -> str:
    """What the loss fits, in a word: TUP's target is -inf where its label is 0, and has no variance."""
    return "label" if make_objective(workspace.experiment.objective).zero_density else "target"


def _signal_free(scored: Scored) -> Any:
    """Whether all rewards of a prompt are equal, shape [prompts]."""
    equal = (scored.counts.equal == scored.counts.n).astype(np.int64)
    return np.bincount(scored.codes, equal) == scored.sizes


def _gains(scored: Scored, workspace: Workspace, stored: int) -> list[str]:
    """A table of the remaining uncertainty for several numbers of further references."""
    ratio = planning_ratio(workspace.experiment.objective)
    transform, beta = ratio.transform, ratio.beta
    signal = ~_signal_free(scored)[scored.codes]
    rows = [("further references", "uncertainty left, where worth most", "the same, shared out evenly")]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        total = max(1, round(factor * stored))
        given = budgets.share(scored, transform=transform, beta=beta, references=total)
        each = total / len(scored.prompts)
        gained = marginal_gain(scored.counts, each, transform=transform, beta=beta)[signal].sum()
        before = given.variance_before or 1.0
        rows.append((f"{total:,}", f"{given.variance_after / before:.1%}", f"{1 - gained / before:.1%}"))
    what = f"(variance of the {_fitted(workspace)}s"
    note = f"{what}, weighted by how near they are to changing sign; in expectation)"
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
    time = f", about {duration(total / rate)} of sampling at the measured rate" if rate and total else ""
    return [*table(rows), "", f"{total:,} rows in all{time}."]
