"""The steps without Prefect: a small experiment on the two-layer model, and what a change of it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import MissingError
from qrpo_core.common.schemas import COMPLETIONS, TRAINING_SET
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute, write_questions


def samples(steps: ExperimentSteps) -> SampleStep:
    step = steps.first.row_steps[0]
    assert isinstance(step, SampleStep)
    return step


def training_prompts(steps: ExperimentSteps) -> int:
    return steps.first.rewards.completions.prompts.num_rows


def test_a_larger_budget_computes_exactly_the_new_rows(settings: dict[str, Any]) -> None:
    steps, first = precompute(changed(settings))
    count = training_prompts(steps)
    assert set(first.values()) == {3 * count}
    old = steps.workspace.blocks.read(samples(steps).recipe, samples(steps).wanted, COMPLETIONS)
    doubled = changed(settings, sampling={"references_per_prompt": 6})
    announced = {stage.stage: stage.missing for stage in plan(Workspace(doubled))}
    steps, second = precompute(doubled)
    assert second == dict.fromkeys(first, 3 * count)
    assert {label: announced[label] for label in second} == second
    wanted = dict.fromkeys(samples(steps).wanted, range(3))
    kept = steps.workspace.blocks.read(samples(steps).recipe, wanted, COMPLETIONS)
    assert kept.equals(old)
    _, third = precompute(doubled)
    assert set(third.values()) == {0}


def test_a_top_up_equals_a_run_from_scratch(settings: dict[str, Any], tmp_path: Path) -> None:
    precompute(changed(settings))
    steps, _ = precompute(changed(settings, sampling={"references_per_prompt": 5}))
    scratch, _ = precompute(
        changed(settings, sampling={"references_per_prompt": 5}, store={"path": str(tmp_path / "other")})
    )
    both = ((*each.first.row_steps, each.first.logprobs) for each in (steps, scratch))
    for one, two in zip(*both, strict=True):
        there = steps.workspace.blocks.read(one.recipe, one.wanted, one.schema)
        here = scratch.workspace.blocks.read(two.recipe, two.wanted, two.schema)
        if one.label != "score reference log-probs":
            assert there.equals(here)
        else:  # sums of another batch's shape differ in float32's last digits
            assert there["logprob"].to_pylist() == pytest.approx(here["logprob"].to_pylist(), rel=1e-5)


def test_prompts_added_in_the_middle_cost_only_their_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    steps, _ = precompute(changed(settings))
    before = training_prompts(steps)
    write_questions(tmp_path / "questions.jsonl", [*range(6), *range(100, 110), *range(6, 12)])
    steps, computed = precompute(changed(settings))
    assert training_prompts(steps) > before
    assert set(computed.values()) == {3 * (training_prompts(steps) - before)}


def test_another_reward_scores_old_samples(settings: dict[str, Any]) -> None:
    precompute(changed(settings))
    other = {key: value for key, value in settings.items() if key != "reward"} | {
        "reward": {"kind": "number"}
    }
    steps, computed = precompute(parse_experiment(other))
    rows = 3 * training_prompts(steps)
    assert computed == {"sample references": 0, "annotate references": rows, "score reference log-probs": 0}


def test_a_changed_ground_truth_scores_that_prompt_again_and_samples_nothing(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["reward"] = {"kind": "number"}
    steps, _ = precompute(parse_experiment(settings))
    prompt = samples(steps).prompts.to_pylist()[0]["messages"][-1]["content"]
    file = tmp_path / "questions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    edited = [line | {"answer": 77} if line["prompt"] == prompt else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in edited))
    _, computed = precompute(parse_experiment(settings))
    assert computed == {"sample references": 0, "annotate references": 3, "score reference log-probs": 0}


def test_a_plan_names_the_field_that_changed(settings: dict[str, Any]) -> None:
    precompute(changed(settings))
    stages = {
        stage.stage: stage for stage in plan(Workspace(changed(settings, sampling={"temperature": 0.7})))
    }
    assert stages["sample references"].why == "sampling.temperature changed"
    assert stages["sample references"].present == 0
    stages = {stage.stage: stage for stage in plan(Workspace(changed(settings, sampling={"batch_size": 1})))}
    assert stages["sample references"].missing == 0


def test_fake_rows_never_pass_for_a_policys(settings: dict[str, Any]) -> None:
    precompute(changed(settings))
    stages = {
        stage.stage: stage
        for stage in plan(Workspace(changed(settings, sampling={"engine": "transformers"})))
    }
    assert stages["sample references"].present == 0


def test_the_training_set_joins_by_id_and_its_targets_are_calibrated(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings, sampling={"references_per_prompt": 8}))
    workspace = steps.workspace
    made = workspace.artifacts.get(steps.first.training_set_recipe)
    table = workspace.load(made, "training_set.parquet", TRAINING_SET)
    rewards = steps.first.rewards.read().to_pylist()
    by_id = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in rewards}
    assert len(table) == 8 * training_prompts(steps) == len(by_id)
    for row in table.to_pylist():
        others = [
            reward
            for (prompt, index), reward in by_id.items()
            if prompt == row["prompt_id"] and index != row["sample_index"]
        ]
        assert row["reward"] == by_id[row["prompt_id"], row["sample_index"]]
        assert row["below"] == sum(other < row["reward"] for other in others)
        assert row["equal"] == sum(other == row["reward"] for other in others)
        assert row["n"] == 7
    data = derive(workspace, made)
    expected = data.diagnostics["normalisation_expected"]
    assert data.diagnostics["normalisation_mean"] == pytest.approx(expected, rel=1e-9)
    assert len(data.items()) == len(table)


def test_what_is_not_there_yet_is_said(settings: dict[str, Any]) -> None:
    with pytest.raises(MissingError, match="no prompts artifact yet"):
        stored_steps(Workspace(changed(settings)))


def test_a_policy_is_named_by_content_not_by_place(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert policies.at(copy).digest == policies.at(tiny_model).digest
    (copy / "README.md").write_text("no matter")
    assert policies.at(copy).digest == policies.at(tiny_model).digest
