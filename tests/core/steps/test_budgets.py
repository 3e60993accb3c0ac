"""Per-prompt budgets and top-ups: what they ask for, and that only that is drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest

from qrpo_core.budget import propose
from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, DamagedError
from qrpo_core.plan import plan
from qrpo_core.steps import budgets
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.budgets import Scored
from qrpo_core.steps.chain import Chain, reference_steps
from qrpo_core.steps.targets import derive
from qrpo_core.steps.top_up import next_portion
from qrpo_core.steps.workspace import Workspace


def stored(chain: Chain) -> dict[str, int]:
    """Reference rows of each prompt, counted from the store."""
    samples, _ = reference_steps(chain.workspace)
    found: dict[str, set[int]] = defaultdict(set)
    for block in chain.workspace.blocks.committed(samples.recipe):
        for run in block.runs:
            found[run.key] |= set(range(run.first, run.first + run.count))
    return {prompt: len(rows) for prompt, rows in found.items()}


def apply(chain: Chain, budget: dict[str, int]) -> None:
    samples, rewards = reference_steps(chain.workspace)
    budgets.write(chain.workspace.objects, samples.recipe, rewards.recipe, budget)


def test_a_budget_gives_some_prompts_more_and_the_rest_nothing(steps: Any, settings: dict[str, Any]) -> None:
    asked = steps.changed(settings)
    chain, _ = steps.precompute(asked)
    before, first = stored(chain), chain.first
    one, two = sorted(before)[:2]
    apply(chain, {one: 7, two: 2})  # 2 is below what every prompt has
    chain, computed = steps.precompute(asked)
    assert computed == dict.fromkeys(computed, 4)
    assert stored(chain) == before | {one: 7}
    assert chain.first.quantiles.key != first.quantiles.key
    data = derive(chain.workspace, chain.workspace.artifacts.get(chain.first.training_set))
    sizes = {row["prompt_id"]: row["n"] for row in data.table.to_pylist()}
    assert sizes == dict.fromkeys(before, 2) | {one: 6}
    # A budget within what every prompt has is none: nothing is computed or named anew.
    plain = Workspace(steps.changed(settings, sampling={"references_per_prompt": 7}))
    apply(chain, {})
    # The helpers of these tests do not check rows.
    planned = [stage for stage in plan(Workspace(asked)) if stage.stage != "check rows"]
    assert all(not stage.missing for stage in planned[:4])
    assert any(stage.missing for stage in plan(plain))


def test_a_budget_belongs_to_its_reward(steps: Any, settings: dict[str, Any]) -> None:
    chain, _ = steps.precompute(steps.changed(settings))
    apply(chain, dict.fromkeys(stored(chain), 9))
    other = {**settings, "reward": {"kind": "sentiment"}}
    samples, _ = reference_steps(Workspace(steps.changed(other)))
    assert samples.budget == {}


def test_a_damaged_budget_is_refused(steps: Any, settings: dict[str, Any]) -> None:
    chain, _ = steps.precompute(steps.changed(settings))
    samples, rewards = reference_steps(chain.workspace)
    chain.workspace.objects.write(budgets.location(samples.recipe, rewards.recipe), b'{"references": 3}')
    with pytest.raises(DamagedError, match="qrpo budget --clear"):
        reference_steps(Workspace(steps.changed(settings)))


def test_the_proposal_goes_to_prompts_with_a_signal_and_is_followed(
    steps: Any, settings: dict[str, Any]
) -> None:
    asked = steps.changed(settings, sampling={"references_per_prompt": 4})
    chain, _ = steps.precompute(asked)
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in chain.first.rewards.read().to_pylist():
        rewards[row["prompt_id"]].append(row["reward"])
    flat = {prompt for prompt, found in rewards.items() if len(set(found)) == 1}
    assert 0 < len(flat) < len(rewards)
    found = propose(chain.workspace, add=10)
    assert found.rows == 10
    assert not flat & found.references.keys()
    assert "further references, given to where they are worth most" in "\n".join(found.lines)
    before = stored(chain)
    apply(chain, dict(found.references))
    chain, computed = steps.precompute(asked)
    assert set(computed.values()) == {10}
    assert {p: n for p, n in stored(chain).items() if n != before[p]} == dict(found.references)


def test_precision_asks_for_what_the_standard_error_says(steps: Any, settings: dict[str, Any]) -> None:
    chain, _ = steps.precompute(steps.changed(settings, sampling={"references_per_prompt": 5}))
    scored = Scored.of(chain.first.rewards.read())
    rewards: dict[str, list[float]] = defaultdict(list)
    for row in chain.first.rewards.read().to_pylist():
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


def run_top_up(steps: Any, workspace: Workspace) -> list[int]:
    """One run of the flow without Prefect: rows of each of its shares."""
    done, left = [], workspace.experiment.top_up.rows_per_run
    while left > 0 and (portion := next_portion(workspace, left, started=bool(done))) is not None:
        counted = [steps.fill(workspace, step) for step in portion.steps]
        assert max(counted) == portion.rows
        done.append(portion.rows)
        left -= portion.rows
    return done


def top_up(steps: Any, settings: dict[str, Any], **asked: Any) -> Experiment:
    return steps.changed({**settings, "top_up": asked}, sampling={"references_per_prompt": 6})  # type: ignore[no-any-return]


def test_a_top_up_brings_every_prompt_to_its_budget_in_bounded_runs(
    steps: Any, settings: dict[str, Any]
) -> None:
    chain, _ = steps.precompute(steps.changed(settings))
    before = stored(chain)
    assert set(before.values()) == {3}
    workspace = Workspace(top_up(steps, settings, rows_per_run=7))
    for _ in range(math.ceil(len(before) / 2)):  # two prompts of three rows a run
        assert sum(run_top_up(steps, workspace)) <= 7
    assert run_top_up(steps, workspace) == []
    assert stored(chain) == dict.fromkeys(before, 6)
    steps_there = {stage.stage: stage.missing for stage in plan(workspace)}
    assert steps_there["sample references"] == steps_there["score references"] == 0


def test_a_top_up_to_a_precision_stops_when_it_is_reached_or_at_the_most(
    steps: Any, settings: dict[str, Any]
) -> None:
    chain, _ = steps.precompute(steps.changed(settings, sampling={"references_per_prompt": 6}))
    asked = top_up(steps, settings, standard_error=0.15, max_references=20, rows_per_run=10_000)
    workspace = Workspace(asked)
    assert sum(run_top_up(steps, workspace)) > 0
    assert run_top_up(steps, workspace) == []
    samples, rewards = reference_steps(workspace)
    assert isinstance(samples, SampleStep)
    scored = Scored.of(rewards.read())
    left = budgets.for_precision(scored, 0.15, most=20)
    have = stored(chain)
    assert set(have) == {prompt for prompt, _ in have.items()}
    assert all(have[prompt] >= count for prompt, count in left.items())
    assert max(have.values()) <= 20
    assert min(have.values()) == 6  # prompts on which all rewards are equal got none
