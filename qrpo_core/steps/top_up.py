"""Which references a top-up draws next: what is missing of the budget, then what precision asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.steps import budgets
from qrpo_core.steps.blocks import BlockStep, RewardStep, SampleStep
from qrpo_core.steps.budgets import Scored
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.truncated import training_rewards
from qrpo_core.steps.workspace import Workspace


@dataclass(frozen=True)
class Portion:
    """Some prompts' missing references: the steps that draw and score them, and how many rows are missing."""

    steps: tuple[BlockStep, ...]
    rows: int


def next_portion(workspace: Workspace, rows: int, *, started: bool = False) -> Portion | None:
    """Prompts whose missing references are at most `rows` in all; None when nothing is left that fits.

    started : False for the first portion of a run, which holds one prompt at least, so that one that needs
        more than `rows` does not keep the rest waiting for ever.

    Where nothing of the budget is missing and a standard error is asked for, the budget is raised first, at
    most twofold: the error of few references is itself uncertain, so it is looked at again before more.
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
    """The first prompts that lack samples or scores, as many as `rows` allows."""
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
    """Rows that each prompt lacks, of samples or of scores, whichever are more."""
    lacking: dict[str, int] = {}
    for step in (samples, rewards):
        lost: dict[str, int] = {}
        for run in workspace.blocks.lacking(step.recipe, step.wanted).runs:
            prompt = run.key.partition(".")[0]
            lost[prompt] = lost.get(prompt, 0) + run.count
        lacking = {prompt: max(lacking.get(prompt, 0), lost.get(prompt, 0)) for prompt in lacking | lost}
    return lacking
