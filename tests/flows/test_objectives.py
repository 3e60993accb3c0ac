"""Other ways to train than the default, through the real flows: offline data with ties, baselines, rounds."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.hashing import completion_index, prompt_id
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.result import report_path, result_lines, results
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Workspace

pytestmark = pytest.mark.slow

SOLUTIONS = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "model_solutions_400.jsonl"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
QUESTIONS = 80
BETA = 0.1


def run(experiment: Experiment) -> dict[str, Any]:
    from flows.align import align

    return {stage.stage: stage for stage in align(experiment)}


def graded(folder: Path) -> list[dict[str, Any]]:
    """The first questions as published, with the number of the answer beside them."""
    if not SOLUTIONS.is_file():
        pytest.skip(f"{SOLUTIONS.name} is not here")
    rows = [json.loads(line) for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()[:QUESTIONS]]
    for row in rows:
        row["answer"] = float(row["ground_truth"].rsplit("A: ", 1)[1].replace(",", ""))
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def gsm8k(model: Path, folder: Path, **sections: dict[str, Any]) -> Experiment:
    settings: dict[str, Any] = {
        "name": "graded",
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "kind": "file",
            "path": str(folder / "graded.jsonl"),
            "prompt_field": "question",
            "ground_truth_field": "answer",
            "completion_fields": SOLVERS,
            "completion_text_field": "solution",
            "completion_reward_field": "is_correct",
            "held_out": 0.1,
        },
        "sampling": {"engine": "fake", "max_new_tokens": 8},
        "reward": {"kind": "number", "extract": "last_number"},
        "training_data": {"mode": "offline", "rewards": "given", "references": "offline"},
        "objective": {"beta": BETA},
        "training": {"precision": "fp32", "batch_size": 64},
        "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        "store": {"path": str(folder / "store")},
    }
    return parse_experiment({**settings, **sections})


def by_hand(grades: list[float], grade: float) -> float:
    """Calibrated target of a graded solution, left out of its own comparison; method, section 3.7."""
    others = list(grades)
    others.remove(grade)

    def quantile(value: float, among: list[float]) -> float:
        return sum(other <= value for other in among) / len(among)

    log_z = math.log(np.mean([math.exp(quantile(g, grades) / BETA) for g in grades]))
    return quantile(grade, others) - BETA * log_z


def test_graded_solutions_with_ties_give_targets_diagnostics_and_a_report(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    rows = graded(tmp_path)
    experiment = gsm8k(long_model, tmp_path)
    stages = run(experiment)
    assert "sample references" not in stages  # the grades are there already, and nothing has to be drawn
    workspace = Workspace(experiment)
    data = derive(workspace, results(workspace).rounds[0].training_set)

    grades = {  # equal solutions of a question are one
        prompt_id([{"role": "user", "content": row["question"]}]): {
            completion_index(row[name]["solution"]): float(row[name]["is_correct"]) for name in SOLVERS
        }
        for row in rows
    }
    trained = set(data.table["prompt_id"].to_pylist())
    assert len(trained) == stored_steps(workspace).first.rewards.completions.prompts.num_rows
    assert len(data.table) == sum(len(grades[prompt]) for prompt in trained)
    assert data.targets is not None
    columns = (data.table["prompt_id"].to_pylist(), data.table["sample_index"].to_pylist())
    for prompt, index, target in zip(*columns, data.targets.target.tolist(), strict=True):
        found = grades[prompt]
        expected = by_hand(list(found.values()), found[index])
        assert target == pytest.approx(expected, rel=1e-12, abs=1e-12)

    facts = data.diagnostics
    atoms = {prompt: Counter(grades[prompt].values()) for prompt in trained}
    assert facts["normaliser"] == "tie_aware"
    assert facts["normalisation_mean"] == pytest.approx(facts["normalisation_expected"], rel=1e-9)
    assert facts["signal_free_prompts"] == sum(len(atom) == 1 for atom in atoms.values()) > 0
    tied = sum(count for atom in atoms.values() for count in atom.values() if count > 1)
    assert facts["tie_rate"] == pytest.approx(tied / len(data.table))
    free = {prompt for prompt, atom in atoms.items() if len(atom) == 1}
    still = [t for p, t in zip(columns[0], data.targets.target.tolist(), strict=True) if p in free]
    assert still == [0.0] * len(still)

    page = report_path(workspace).read_text(encoding="utf-8")
    assert "What training asks for" in page
    assert "Prompts without signal (all rewards equal)" in page
    text = "\n".join(result_lines(workspace))
    assert "Normalisation check (tie_aware)" in text
    assert "As normaliser tie_aware implies." in text


@pytest.mark.long
def test_a_baseline_on_the_same_grades_takes_their_pairs(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    graded(tmp_path)
    run(gsm8k(long_model, tmp_path))
    baseline = gsm8k(long_model, tmp_path, objective={"kind": "dpo", "beta": 0.1})
    stages = run(baseline)
    assert stages["score reference log-probs"].computed == 0
    assert stages["assemble training set"].computed == 0
    assert stages["train policy"].computed == 1
    workspace = Workspace(baseline)
    made = results(workspace)
    history = json.loads(workspace.artifacts.read(made.train, "history.json"))
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert made.train.facts["rows"] == made.train.facts["diagnostics"]["training_pairs"]
    text = "\n".join(result_lines(workspace))
    assert "pairs with equal rewards" in text
    assert "Normalisation check" not in text
    assert "No calibrated targets" in report_path(workspace).read_text(encoding="utf-8")


def test_rounds_are_planned_run_cached_and_continued(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    words = [f"item {number}" for number in range(14)]
    settings: dict[str, Any] = {
        "name": "rounds",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {"kind": "template", "templates": ["Say {w}"], "words": {"w": words}, "size": 14}
        | {"held_out": 0.4},
        "sampling": {"references_per_prompt": 3, "max_new_tokens": 6},
        "reward": {"kind": "length", "max_words": 1},
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-2},
        "rounds": {"count": 2, "samples_per_prompt": 2},
        "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        "store": {"path": str(tmp_path / "store")},
    }
    two = parse_experiment(settings)
    announced = {stage.stage: stage.missing for stage in plan(Workspace(two))}
    first = run(two)
    prompts = stored_steps(Workspace(two)).first.rewards.completions.prompts.num_rows
    assert (
        announced["sample completions, round 2"]
        == first["sample completions, round 2"].computed
        == 2 * prompts
    )
    assert set(announced) == set(first)
    again = run(two)
    assert all(stage.state == "Cached" and not stage.computed for stage in again.values())

    # One more round later: only that round, and the evaluation of its policy.
    three = parse_experiment({**settings, "rounds": {"count": 3, "samples_per_prompt": 2}})
    more = run(three)
    assert all(not stage.computed for stage in more.values() if "round 2" in stage.stage)
    assert more["train policy"].state == "Cached"
    assert more["train policy, round 3"].computed == 1
    digests = [round_.start.digest for round_ in stored_steps(Workspace(three)).rounds()]
    assert len(set(digests)) == 3
    workspace = Workspace(three)
    made = results(workspace)
    steps = sum(each.train.facts["steps"] for each in made.rounds)
    page = report_path(workspace).read_text(encoding="utf-8")
    assert "train policy, round 3" in page
    assert made.train.facts["steps"] < steps
    assert pc.sum(derive(workspace, made.rounds[2].training_set).table["n"]).as_py() == 3 * 2 * prompts


def test_one_sample_and_one_completion_of_the_data_set_a_prompt(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "tries": ["w " * (n % 3 + 1) + str(n)]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "name": "mixed",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {"kind": "file", "path": str(tmp_path / "rows.jsonl"), "completion_fields": ["tries"]}
        | {"held_out": 0.3},
        "sampling": {"engine": "fake", "references_per_prompt": 3, "max_new_tokens": 6},
        "reward": {"kind": "length", "max_words": 1},
        "training_data": {"mode": "mixed"},
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        "store": {"path": str(tmp_path / "store")},
    }
    experiment = parse_experiment(settings)
    announced = {stage.stage: stage.missing for stage in plan(Workspace(experiment))}
    made = run(experiment)
    assert list(announced) == list(made)
    prompts = stored_steps(Workspace(experiment)).first.rewards.completions.prompts.num_rows
    for stage in ("score reference log-probs", "score reference log-probs, offline"):
        assert announced[stage] == made[stage].computed == prompts
    assert results(Workspace(experiment)).train.facts["rows"] == 2 * prompts
    page = report_path(Workspace(experiment)).read_text(encoding="utf-8")
    for source in ("samples of the policy", "completions of the data set"):
        assert f"Of these, {source}</th><td>{prompts}</td>" in page
    assert all(stage.state == "Cached" and not stage.computed for stage in run(experiment).values())
