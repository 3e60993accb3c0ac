"""What a train artifact says of its policy, and what the engine's copy of it is measured to be."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, ModelError
from qrpo_core.config import Experiment
from qrpo_core.inspection.result import results, saved_rows
from qrpo_core.maintenance.gc import garbage
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.pipeline import evaluation, run_report, training
from qrpo_core.pipeline.engine_copy import engine_copy_of
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.manifest import Manifest
from qrpo_core.training.launch import exclusive_lock
from qrpo_core.training.survival import LogprobComparison
from tests.core.small_experiment import changed, fill, precompute


@pytest.fixture
def asked(settings: dict[str, Any], tmp_path: Path, tiny_model: Path) -> Callable[..., Experiment]:
    """The small experiment on a model of the bfloat16 grid; its engine computes bfloat16 wherever it runs."""
    model = load_model(tiny_model, "bfloat16")
    model.save_pretrained(tmp_path / "start")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "start")
    (tmp_path / "longer.py").write_text(
        "def score(batch):\n    return [float(len(row.completion)) for row in batch]\n"
    )
    reward = {"kind": "python", "python": {"file": str(tmp_path / "longer.py"), "function": "longer:score"}}

    def make(**changes: dict[str, Any]) -> Experiment:
        sections = {
            "model": {"path": str(tmp_path / "start"), "dtype": "bfloat16"},
            "sampling": {"engine": "transformers", "max_new_tokens": 6},
            "training": {"learning_rate": 3e-3, "warmup_ratio": 0.0},
            "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        }
        for name, values in changes.items():
            sections[name] = sections.get(name, {}) | values
        found: Experiment = changed({**settings, "reward": reward}, **sections)
        return found

    return make


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrpo_core.models.precision.native_bfloat16", lambda device: True)


def trained(experiment: Experiment) -> tuple[ExperimentSteps, Manifest]:
    """Everything up to the first round's policy."""
    steps, _ = precompute(experiment)
    workspace, first = steps.workspace, steps.first
    data = workspace.artifacts.get(first.training_set_recipe)
    return steps, training.build(workspace, first.train_recipe, data, first.start)


def evaluated(steps: ExperimentSteps) -> Manifest:
    end = steps.after(steps.last())
    for step in (*steps.before, *end.after, *end.divergence):
        fill(steps.workspace, step)
    return evaluation.build(steps.workspace, end)


def test_the_artifact_says_how_much_survived(asked: Callable[..., Experiment]) -> None:
    steps, made = trained(asked())
    saved = made.facts["saved"]
    assert saved["dtype"] == "float32"
    assert saved["share"] == pytest.approx(1, abs=1e-4)
    assert saved["written"] == pytest.approx(saved["trained"], rel=1e-3)
    scored = LogprobComparison.from_json(steps.workspace.artifacts.read(made, training.LOGPROB_COMPARISON))
    assert scored.facts == saved
    assert len(scored.rows) == saved["rows"] == min(64, made.facts["rows"])
    card = (steps.workspace.artifacts.folder(made, "policy") / "README.md").read_text()
    assert "Saved in float32: 100.0 % of the training survived (mean |log-ratio| " in card
    assert not training.work_directory(steps.first.train_recipe).exists()


def test_the_copy_that_an_engine_draws_from_is_measured_and_reported(
    asked: Callable[..., Experiment],
) -> None:
    steps, made = trained(asked())
    result = evaluated(steps)
    facts = result.facts["drawn"]
    assert facts["dtype"] == "bfloat16"
    assert facts["share"] == pytest.approx(1, abs=0.1)
    assert 0 < facts["largest_difference"] < 1
    assert facts["trained"] == pytest.approx(made.facts["saved"]["trained"])
    end = steps.after(steps.last())
    report = run_report.build(steps.workspace, steps, end)
    text = steps.workspace.artifacts.read(report, "report.html").decode()
    rows = saved_rows(results(steps.workspace))
    assert [label for label, _ in rows] == [
        "Saved policy, float32",
        "Rewards after are drawn from a bfloat16 copy",
    ]
    for label, value in rows:
        assert label in text
        assert value.replace(">", "&gt;") in text
    left = garbage([steps.workspace], datetime.now(UTC) + timedelta(days=1)).garbage
    assert not [each.what for each in left if "engine_copy" in each.what]


def test_an_engine_of_float32_draws_from_the_policy_itself(
    asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrpo_core.models.precision.native_bfloat16", lambda device: False)
    steps, _ = trained(asked())
    copied = engine_copy_of(steps.after(steps.last()).after.samples)
    assert copied is not None
    facts = copied.build().facts
    assert facts["dtype"] == "float32"
    assert facts["largest_difference"] < 1e-3


def test_adapters_beside_a_rounded_start_are_measured_as_they_are_used(
    asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM loads with vllm.merged off, computed here: the start's copy and bfloat16 adapters."""
    steps, _ = trained(asked(training={"lora_rank": 4, "learning_rate": 1e-2}))
    samples = steps.after(steps.last()).after.samples
    adapters = samples.policy.directory / "adapter"
    monkeypatch.setattr(SampleStep, "adapters", adapters)
    copied = engine_copy_of(samples)
    assert copied is not None
    facts = copied.build().facts
    assert facts["share"] == pytest.approx(1, abs=0.1)
    assert 0 < facts["largest_difference"] < 1


def test_only_a_policy_trained_here_has_a_copy_to_measure(asked: Callable[..., Experiment]) -> None:
    steps, made = trained(asked())
    assert engine_copy_of(steps.before.samples) is None, "the reference is what it is"
    assert engine_copy_of(steps.before.rewards) is None
    after = steps.after(steps.last()).after.samples
    assert engine_copy_of(after) is not None
    older = replace(after, policy=replace(after.policy, artifact=replace(made, files={})))
    assert engine_copy_of(older) is None
    fake = stored_steps(Workspace(asked(sampling={"engine": "fake"}))).before.samples
    assert engine_copy_of(replace(fake, policy=after.policy)) is None, "the fake engine draws from no policy"


def test_a_refused_policy_is_saved_otherwise_without_training_again(
    asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = "qrpo_core.models.rounding.stochastic_bfloat16"
    monkeypatch.setattr(nearest, lambda tensor, name: tensor.bfloat16())
    small = {"learning_rate": 1e-5, "save_dtype": "bfloat16"}
    with pytest.raises(
        ModelError, match=r"set training\.save_dtype: float32; the next run saves the finished training again"
    ):
        trained(asked(training=small))
    steps = stored_steps(Workspace(asked(training=small | {"save_dtype": "float32"})))
    assert steps.workspace.artifacts.find(steps.first.train_recipe) is None
    seen: list[int] = []
    data = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    made = training.build(
        steps.workspace, steps.first.train_recipe, data, steps.first.start, lambda step, *_: seen.append(step)
    )
    assert seen == []
    assert made.facts["steps"] == len(json.loads(steps.workspace.artifacts.read(made, "history.json"))) > 0
    assert made.facts["saved"]["share"] == pytest.approx(1, abs=0.01)


def test_what_another_run_trains_in_is_left_to_it(
    asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one saves the same training in another precision, while this one commits its policy."""
    steps, _ = precompute(asked())
    work = training.work_directory(steps.first.train_recipe)
    make = Workspace.make
    with contextlib.ExitStack() as other:

        def overtaken(workspace: Workspace, *given: Any) -> Manifest:
            made = make(workspace, *given)
            other.enter_context(exclusive_lock(work / "lock"))
            return made

        monkeypatch.setattr(Workspace, "make", overtaken)
        data = steps.workspace.artifacts.get(steps.first.training_set_recipe)
        training.build(steps.workspace, steps.first.train_recipe, data, steps.first.start)
        assert (work / "trained").is_dir()


def test_two_precisions_are_two_policies_of_one_training(asked: Callable[..., Experiment]) -> None:
    precompute(asked())
    workspaces = [Workspace(asked(training={"save_dtype": dtype})) for dtype in ("float32", "bfloat16")]
    one, two = (stored_steps(workspace).first.train_recipe for workspace in workspaces)
    assert one.key != two.key
    assert training.work_directory(one) == training.work_directory(two)
    longer = stored_steps(Workspace(asked(training={"epochs": 2}))).first.train_recipe
    assert training.work_directory(longer) != training.work_directory(one)


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens", "lm_head"])
def test_adapters_on_tied_weights_are_refused_before_anything_runs(
    asked: Callable[..., Experiment], tmp_path: Path, target: str
) -> None:
    model = load_model(tmp_path / "start", "float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "start")
    lora = {"lora_rank": 4, "lora_targets": ["q_proj", target]}
    with pytest.raises(ConfigError, match="whose weight is also that of"):
        check(Workspace(asked(training=lora)))
    assert not (tmp_path / "store").exists()
    check(Workspace(asked(training={"lora_rank": 4})))
    check(Workspace(asked(training={"lora_rank": 4, "lora_targets": ["q_proj"]})))
