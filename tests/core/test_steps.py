"""The steps without Prefect: a small experiment on the two-layer model, and what a change of it costs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qrpo_core.config import Experiment
from qrpo_core.errors import MissingError, ObjectiveError
from qrpo_core.experiments import parse_experiment
from qrpo_core.plan import plan
from qrpo_core.records import COMPLETIONS, REWARDS, TRAINING_SET
from qrpo_core.steps import policies, prompts, quantiles, training_set
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.tables import load
from qrpo_core.steps.workspace import Workspace


def write_questions(path: Path, numbers: list[int]) -> None:
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": n}) + "\n" for n in numbers))


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    write_questions(tmp_path / "questions.jsonl", list(range(12)))
    return {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {
            "kind": "file",
            "path": str(tmp_path / "questions.jsonl"),
            "reference_field": "answer",
            "held_out": 0.3,
        },
        "sampling": {"engine": "fake", "references_per_prompt": 3, "max_new_tokens": 6},
        "reward": {"kind": "length", "max_words": 3},
        "training": {"precision": "fp32", "batch_size": 4, "micro_batch_size": 4},
        "store": {"path": str(tmp_path / "store"), "rows_per_block": 5},
    }


def changed(settings: dict[str, Any], **sections: dict[str, Any]) -> Experiment:
    return parse_experiment(
        {**settings, **{name: settings.get(name, {}) | new for name, new in sections.items()}}
    )


def fill(workspace: Workspace, step: BlockStep) -> int:
    rows = 0
    for each in workspace.blocks.plan(step.recipe, step.wanted, workspace.experiment.store.rows_per_block):
        table, facts = step.compute(each, lambda n: None)
        workspace.blocks.commit(each, table, step.schema, 1.0, **facts)
        rows += each.rows
    return rows


def precompute(experiment: Experiment) -> tuple[Chain, dict[str, int]]:
    """Every step before training, and how many rows each had to compute."""
    workspace = Workspace(experiment)
    prompts.build(workspace, prompts.recipe(workspace))
    chain = stored_chain(workspace)
    return chain, {step.label: fill(workspace, step) for step in chain.training}


def training_prompts(chain: Chain) -> int:
    return chain.training.samples.prompts.num_rows


def test_a_larger_budget_computes_exactly_the_new_rows(settings: dict[str, Any]) -> None:
    chain, first = precompute(changed(settings))
    count = training_prompts(chain)
    assert set(first.values()) == {3 * count}
    old = chain.workspace.blocks.read(
        chain.training.samples.recipe, chain.training.samples.wanted, COMPLETIONS
    )
    doubled = changed(settings, sampling={"references_per_prompt": 6})
    announced = {stage.stage: stage.missing for stage in plan(Workspace(doubled))}
    chain, second = precompute(doubled)
    assert second == dict.fromkeys(first, 3 * count)
    assert {label: announced[label] for label in second} == second
    kept = chain.workspace.blocks.read(
        chain.training.samples.recipe, dict.fromkeys(chain.training.samples.wanted, 3), COMPLETIONS
    )
    assert kept.equals(old)
    _, third = precompute(doubled)
    assert set(third.values()) == {0}


def test_a_top_up_equals_a_run_from_scratch(settings: dict[str, Any], tmp_path: Path) -> None:
    precompute(changed(settings))
    chain, _ = precompute(changed(settings, sampling={"references_per_prompt": 5}))
    scratch, _ = precompute(
        changed(settings, sampling={"references_per_prompt": 5}, store={"path": str(tmp_path / "other")})
    )
    for one, two in zip(chain.training, scratch.training, strict=True):
        there = chain.workspace.blocks.read(one.recipe, one.wanted, one.schema)
        here = scratch.workspace.blocks.read(two.recipe, two.wanted, two.schema)
        if one.label != "reference log-probs":
            assert there.equals(here)
        else:  # sums of another batch's shape differ in float32's last digits
            assert there["logprob"].to_pylist() == pytest.approx(here["logprob"].to_pylist(), rel=1e-5)


def test_prompts_added_in_the_middle_cost_only_their_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    chain, _ = precompute(changed(settings))
    before = training_prompts(chain)
    write_questions(tmp_path / "questions.jsonl", [*range(6), *range(100, 110), *range(6, 12)])
    chain, computed = precompute(changed(settings))
    assert training_prompts(chain) > before
    assert set(computed.values()) == {3 * (training_prompts(chain) - before)}


def test_another_reward_scores_old_samples(settings: dict[str, Any]) -> None:
    precompute(changed(settings))
    other = {key: value for key, value in settings.items() if key != "reward"} | {
        "reward": {"kind": "number"}
    }
    chain, computed = precompute(parse_experiment(other))
    rows = 3 * training_prompts(chain)
    assert computed == {"sample references": 0, "score references": rows, "reference log-probs": 0}


def test_a_changed_reference_scores_that_prompt_again_and_samples_nothing(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["reward"] = {"kind": "number"}
    chain, _ = precompute(parse_experiment(settings))
    prompt = chain.training.samples.prompts.to_pylist()[0]["messages"][-1]["content"]
    file = tmp_path / "questions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    edited = [line | {"answer": 77} if line["prompt"] == prompt else line for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in edited))
    _, computed = precompute(parse_experiment(settings))
    assert computed == {"sample references": 0, "score references": 3, "reference log-probs": 0}


def test_a_plan_names_the_field_that_changed(settings: dict[str, Any]) -> None:
    precompute(changed(settings))
    stages = {
        stage.stage: stage for stage in plan(Workspace(changed(settings, sampling={"temperature": 0.7})))
    }
    assert "config.temperature" in stages["sample references"].why
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
    chain, _ = precompute(changed(settings, sampling={"references_per_prompt": 8}))
    workspace = chain.workspace
    counts = quantiles.build(workspace, chain.quantiles, chain.training.rewards)
    made = training_set.build(workspace, chain.training_set, counts, chain.training.logprobs)
    table = load(workspace, made, "training_set.parquet", TRAINING_SET)
    rewards = workspace.blocks.read(chain.training.rewards.recipe, chain.training.rewards.wanted, REWARDS)
    by_id = {(row["prompt_id"], row["sample_index"]): row["reward"] for row in rewards.to_pylist()}
    assert len(table) == 8 * training_prompts(chain) == len(by_id)
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
    data = training_set.derive(workspace, made)
    assert data.diagnostics["normalisation_mean"] == pytest.approx(1.0, rel=1e-9)
    assert len(data.examples()) == len(table)


def reward_table(rewards: dict[str, list[float | None]]) -> pa.Table:
    rows = [
        (prompt, index, value) for prompt, values in rewards.items() for index, value in enumerate(values)
    ]
    return pa.table(
        {
            "prompt_id": [row[0] for row in rows],
            "sample_index": pa.array([row[1] for row in rows], pa.int32()),
            "reference_digest": [""] * len(rows),
            "reward": pa.array([row[2] for row in rows], pa.float64()),
            "status": ["parse_error" if row[2] is None else "ok" for row in rows],
            "detail": [""] * len(rows),
        }
    )


def test_rows_without_a_reward_enter_no_quantile_and_are_counted() -> None:
    table = reward_table({"a": [0.0, None, 1.0], "b": [None, 2.0, None], "c": [None, None, None]})
    counts, references, facts = quantiles.rank(table)
    assert Counter(counts["prompt_id"].to_pylist()) == {"a": 2}
    assert counts["n"].to_pylist() == [1, 1]
    assert references.to_pylist() == [{"prompt_id": "a", "rewards": [0.0, 1.0]}]
    assert facts == {"status": {"ok": 3, "parse_error": 6}, "prompts": 1, "rows": 2, "prompts_left_out": 2}


def test_no_prompt_with_two_rewards_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="references_per_prompt to 2 or more"):
        quantiles.rank(reward_table({"a": [1.0], "b": [None, 3.0]}))


def test_what_is_not_there_yet_is_said(settings: dict[str, Any]) -> None:
    with pytest.raises(MissingError, match="no prompts artifact yet"):
        stored_chain(Workspace(changed(settings)))


def test_a_policy_is_named_by_content_not_by_place(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert policies.at(copy).digest == policies.at(tiny_model).digest
    (copy / "README.md").write_text("no matter")
    assert policies.at(copy).digest == policies.at(tiny_model).digest
