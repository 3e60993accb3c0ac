"""Per-prompt budgets and top-ups: what they ask for, and that only that is drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from qrpo_core.common.errors import ConfigError, DamagedError
from qrpo_core.config import Experiment
from qrpo_core.inspection.budget import propose
from qrpo_core.inspection.plan import plan
from qrpo_core.objective.allocation import marginal_gain, target_standard_error, threshold_quantile
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.transforms import get_transform
from qrpo_core.objective.truncated_logit import TruncatedLogit
from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.budgets import Scored
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, reference_steps
from qrpo_core.pipeline.ranked import planning_ratio
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.top_up import next_portion
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, fill, precompute


def stored(steps: ExperimentSteps) -> dict[str, int]:
    """Reference rows of each prompt, counted from the store."""
    samples, _ = reference_steps(steps.workspace)
    found: dict[str, set[int]] = defaultdict(set)
    for block in steps.workspace.blocks.committed(samples.recipe):
        for row_range in block.ranges:
            found[row_range.key] |= set(range(row_range.first, row_range.first + row_range.count))
    return {prompt: len(rows) for prompt, rows in found.items()}


def apply(steps: ExperimentSteps, budget: dict[str, int]) -> None:
    samples, rewards = reference_steps(steps.workspace)
    budgets.write(steps.workspace.objects, samples.recipe, rewards.recipe, budget)


def test_a_budget_gives_some_prompts_more_and_the_rest_nothing(settings: dict[str, Any]) -> None:
    asked = changed(settings)
    steps, _ = precompute(asked)
    before, first = stored(steps), steps.first
    one, two = sorted(before)[:2]
    apply(steps, {one: 7, two: 2})  # 2 is below what every prompt has
    steps, computed = precompute(asked)
    assert computed == dict.fromkeys(computed, 4)
    assert stored(steps) == before | {one: 7}
    assert steps.first.quantiles_recipe.key != first.quantiles_recipe.key
    data = derive(steps.workspace, steps.workspace.artifacts.get(steps.first.training_set_recipe))
    sizes = {row["prompt_id"]: row["n"] for row in data.table.to_pylist()}
    assert sizes == dict.fromkeys(before, 2) | {one: 6}
    # A budget within what every prompt has is none: nothing is computed or named anew.
    plain = Workspace(changed(settings, sampling={"references_per_prompt": 7}))
    apply(steps, {})
    # The helpers of these tests do not check rows.
    planned = [stage for stage in plan(Workspace(asked)) if stage.stage != "check rows"]
    assert all(not stage.missing for stage in planned[:4])
    assert any(stage.missing for stage in plan(plain))


def test_a_budget_belongs_to_its_reward(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings))
    apply(steps, dict.fromkeys(stored(steps), 9))
    other = {**settings, "reward": {"kind": "sentiment"}}
    samples, _ = reference_steps(Workspace(changed(other)))
    assert samples.budget == {}


def test_a_damaged_budget_is_refused(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings))
    samples, rewards = reference_steps(steps.workspace)
    steps.workspace.objects.write(budgets.location(samples.recipe, rewards.recipe), b'{"references": 3}')
    with pytest.raises(DamagedError, match="qrpo budget --clear"):
        reference_steps(Workspace(changed(settings)))


def test_the_proposal_goes_to_prompts_with_a_signal_and_is_followed(settings: dict[str, Any]) -> None:
    asked = changed(settings, sampling={"references_per_prompt": 4})
    steps, _ = precompute(asked)
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in steps.first.rewards.read().to_pylist():
        rewards[row["prompt_id"]].append(row["reward"])
    flat = {prompt for prompt, found in rewards.items() if len(set(found)) == 1}
    assert 0 < len(flat) < len(rewards)
    found = propose(steps.workspace, add=10)
    assert found.rows == 10
    assert not flat & found.references.keys()
    assert "further references, given where they are worth most" in "\n".join(found.lines)
    before = stored(steps)
    apply(steps, dict(found.references))
    steps, computed = precompute(asked)
    assert set(computed.values()) == {10}
    assert {p: n for p, n in stored(steps).items() if n != before[p]} == dict(found.references)


def test_precision_asks_for_what_the_standard_error_says(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings, sampling={"references_per_prompt": 5}))
    scored = Scored.of(steps.first.rewards.read())
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in steps.first.rewards.read().to_pylist():
        rewards[row["prompt_id"]].append(row["reward"])
    wanted = budgets.for_precision(scored, 0.1, most=60)
    for prompt, found in rewards.items():
        worst = 0.0
        for place, reward in enumerate(found):
            others = found[:place] + found[place + 1 :]
            q = sum(other <= reward for other in others) / 4
            worst = max(worst, q * (1 - q))
        needed = 1 + math.ceil(worst / 0.1**2 - 1e-9)
        assert wanted.get(prompt, 0) == (min(60, needed) if worst > 0 and needed > 5 else 0)
    with pytest.raises(ConfigError, match="cannot be aimed at"):
        budgets.for_precision(scored, 0.0, most=10)


def run_top_up(workspace: Workspace) -> list[int]:
    """One run of the flow without Prefect: rows of each of its shares."""
    done, left = [], workspace.experiment.top_up.rows_per_run
    while left > 0 and (portion := next_portion(workspace, left, started=bool(done))) is not None:
        counted = [fill(workspace, step) for step in portion.steps]
        assert max(counted) == portion.rows
        done.append(portion.rows)
        left -= portion.rows
    return done


def top_up(settings: dict[str, Any], **asked: Any) -> Experiment:
    return changed({**settings, "top_up": asked}, sampling={"references_per_prompt": 6})  # type: ignore[no-any-return]


def test_a_top_up_brings_every_prompt_to_its_budget_in_bounded_runs(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings))
    before = stored(steps)
    assert set(before.values()) == {3}
    workspace = Workspace(top_up(settings, rows_per_run=7))
    for _ in range(math.ceil(len(before) / 2)):  # two prompts of three rows a run
        assert sum(run_top_up(workspace)) <= 7
    assert run_top_up(workspace) == []
    assert stored(steps) == dict.fromkeys(before, 6)
    steps_there = {stage.stage: stage.missing for stage in plan(workspace)}
    assert steps_there["sample references"] == steps_there["annotate references"] == 0


def test_a_top_up_to_a_precision_stops_when_it_is_reached_or_at_the_most(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings, sampling={"references_per_prompt": 6}))
    asked = top_up(settings, standard_error=0.15, max_references=20, rows_per_run=10_000)
    workspace = Workspace(asked)
    assert sum(run_top_up(workspace)) > 0
    assert run_top_up(workspace) == []
    samples, rewards = reference_steps(workspace)
    assert isinstance(samples, SampleStep)
    scored = Scored.of(rewards.read())
    left = budgets.for_precision(scored, 0.15, most=20)
    have = stored(steps)
    assert set(have) == {prompt for prompt, _ in have.items()}
    assert all(have[prompt] >= count for prompt, count in left.items())
    assert max(have.values()) <= 20
    assert min(have.values()) == 6  # prompts on which all rewards are equal got none


def test_tup_is_planned_by_its_labels_and_its_own_threshold(settings: dict[str, Any]) -> None:
    """At lambda 1/2 a completion that most references beat has the label 0 for sure, and needs no budget."""
    counts = RankCounts(np.array([2, 60, 88]), np.zeros(3, np.int64), np.full(3, 100))
    ratio = planning_ratio(changed(settings, objective={"kind": "tup"}).objective)
    assert isinstance(ratio.transform, TruncatedLogit)
    error = ratio.beta * target_standard_error(counts, transform=ratio.transform, beta=ratio.beta)
    # Far above lambda the label is the quantile less lambda.
    plain = target_standard_error(counts, transform=get_transform("identity"), beta=1.0)
    assert error[2] == pytest.approx(plain[2], rel=1e-12)
    assert error[0] == 0
    threshold = threshold_quantile(ratio.transform, ratio.beta)
    gain = marginal_gain(counts, 10, transform=ratio.transform, beta=ratio.beta)
    assert 0.5 < threshold < 1
    assert gain[0] == 0 < gain[1] < gain[2]

    steps, _ = precompute(changed(settings, sampling={"references_per_prompt": 6}, objective={"kind": "tup"}))
    text = "\n".join(propose(steps.workspace, add=10).lines)
    assert "value (transform truncated_logit, beta 0.1)" in text
    assert "Standard error of a label" in text
    assert "nan" not in text
    assert f"{threshold:.1%}" in text


@pytest.mark.parametrize(("kind", "why"), [("a_star", "estimate V"), ("dpo", "compares completions")])
def test_objectives_without_quantiles_have_no_budget_to_plan(
    settings: dict[str, Any], kind: str, why: str
) -> None:
    steps, _ = precompute(changed(settings | {"training_data": {"mode": "pairs"}}, objective={"kind": kind}))
    with pytest.raises(ConfigError, match=f"objective.kind '{kind}' .*{why}"):
        propose(steps.workspace, add=10)
