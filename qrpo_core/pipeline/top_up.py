"""The references that a top-up draws next.

First come the missing references of the budget. Then the budget is raised until the quantiles have the
standard error `top_up.standard_error`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.budgets import Scored
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.row_steps import BlockStep, RewardStep, SampleStep
from qrpo_core.pipeline.truncated import training_rewards
from qrpo_core.pipeline.workspace import Workspace


@dataclass(frozen=True)
class Portion:
    """Missing references of some prompts.

    steps : the steps that draw and score them. rows : the number of missing rows.
    """

    steps: tuple[BlockStep, ...]
    rows: int


def next_portion(workspace: Workspace, rows: int, *, started: bool = False) -> Portion | None:
    """The next prompts whose missing references are at most `rows` in all; None if no prompt fits.

    started : whether this run has computed a portion. The first portion has at least one prompt, even one
        that lacks more than `rows`: otherwise that prompt would block the others for ever.

    If the budget has no missing reference and `top_up.standard_error` is set, this raises the budget, to at
    most twice the references of a prompt. The error of few references is itself uncertain, so it is estimated
    again before the budget grows further.
    """
    samples, rewards = reference_steps(workspace)
    portion = _missing(workspace, samples, rewards, rows, started)
    target = workspace.experiment.top_up.standard_error
    if portion is not None or target is None or _lacking(workspace, samples, rewards):
        return portion
    wanted = budgets.for_precision(
        Scored.of(training_rewards(workspace.experiment, rewards)),
        target,
        workspace.experiment.top_up.max_references,
    )
    have = {prompt: len(indices) for prompt, indices in samples.wanted.items()}
    grown = {prompt: min(count, 2 * have[prompt]) for prompt, count in wanted.items() if count > have[prompt]}
    if not grown:
        return None
    budget = {**budgets.read(workspace.objects, samples.recipe, rewards.recipe), **grown}
    budgets.write(workspace.objects, samples.recipe, rewards.recipe, budget)
    return _missing(workspace, *reference_steps(workspace), rows, started)


def _missing(
    workspace: Workspace, samples: SampleStep, rewards: RewardStep, rows: int, started: bool
) -> Portion | None:
    """The first prompts that lack samples or rewards, at most `rows` missing rows; None if there are none."""
    chosen: list[str] = []
    total = 0
    for prompt, count in _lacking(workspace, samples, rewards).items():
        if total + count > rows and (chosen or started):
            break
        chosen.append(prompt)
        total += count
    if not chosen:
        return None
    table = samples.prompts.filter(pc.is_in(samples.prompts["prompt_id"], value_set=pa.array(chosen)))
    some = replace(samples, prompts=table)
    return Portion((some, RewardStep(some, rewards.label)), total)


def _lacking(workspace: Workspace, samples: SampleStep, rewards: RewardStep) -> dict[str, int]:
    """The number of missing rows of each prompt: of its samples or of its rewards, the larger number."""
    lacking: dict[str, int] = {}
    for step in (samples, rewards):
        lost: dict[str, int] = {}
        for row_range in workspace.blocks.missing(step.recipe, step.wanted).ranges:
            prompt = row_range.key.partition(".")[0]
            lost[prompt] = lost.get(prompt, 0) + row_range.count
        lacking = {prompt: max(lacking.get(prompt, 0), lost.get(prompt, 0)) for prompt in lacking | lost}
    return lacking
