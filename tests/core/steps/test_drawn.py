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

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, ModelError
from qrpo_core.inventory.garbage import garbage
from qrpo_core.policy import load_model, load_tokenizer
from qrpo_core.preflight import check
from qrpo_core.show import results, saved_rows
from qrpo_core.steps import evaluation, training
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.drawn import drawn_copy
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.train.launch import alone
from qrpo_core.train.survival import ScoredRows


@pytest.fixture
def asked(
    steps: Any, settings: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> Callable[..., Experiment]:
    """The small experiment on a model of the bfloat16 grid; its engine computes bfloat16 wherever it runs."""
    model = load_model(tiny_model, "bfloat16")
    model.save_pretrained(tmp_path / "start")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "start")

    def make(**changes: dict[str, Any]) -> Experiment:
        sections = {
            "model": {"path": str(tmp_path / "start"), "dtype": "bfloat16"},
            "sampling": {"engine": "transformers", "max_new_tokens": 6},
            "training": {"learning_rate": 3e-3, "warmup_ratio": 0.0},
            "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        }
        for name, values in changes.items():
            sections[name] = sections.get(name, {}) | values
        found: Experiment = steps.changed(settings, **sections)
        return found

    return make


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qrpo_core.engines.numerics.native_bfloat16", lambda device: True)


def trained(steps: Any, experiment: Experiment) -> tuple[Chain, Manifest]:
    """Everything up to the first round's policy."""
    chain, _ = steps.precompute(experiment)
    workspace, first = chain.workspace, chain.first
    data = workspace.artifacts.get(first.training_set)
    return chain, training.build(workspace, first.train, data, first.start)


def evaluated(steps: Any, chain: Chain) -> Manifest:
    end = chain.after(chain.last())
    for step in (*chain.before, *end.after, *end.divergence):
        steps.fill(chain.workspace, step)
    return evaluation.build(chain.workspace, chain, end)


def test_the_artifact_says_how_much_survived(steps: Any, asked: Callable[..., Experiment]) -> None:
    chain, made = trained(steps, asked())
    saved = made.facts["saved"]
    assert saved["dtype"] == "float32"
    assert saved["share"] == pytest.approx(1, abs=1e-4)
    assert saved["written"] == pytest.approx(saved["trained"], rel=1e-3)
    scored = ScoredRows.from_json(chain.workspace.artifacts.read(made, training.SCORED_ROWS))
    assert scored.facts == saved
    assert len(scored.rows) == saved["rows"] == min(64, made.facts["rows"])
    card = (chain.workspace.artifacts.folder(made, "policy") / "README.md").read_text()
    assert "Saved in float32: 100.0 % of the training survived (mean |log-ratio| " in card
    assert not training.work_directory(chain.first.train).exists()


def test_the_copy_that_an_engine_draws_from_is_measured_and_reported(
    steps: Any, asked: Callable[..., Experiment]
) -> None:
    chain, made = trained(steps, asked())
    result = evaluated(steps, chain)
    facts = result.facts["drawn"]
    assert facts["dtype"] == "bfloat16"
    assert facts["share"] == pytest.approx(1, abs=0.1)
    assert 0 < facts["largest_difference"] < 1
    assert facts["trained"] == pytest.approx(made.facts["saved"]["trained"])
    end = chain.after(chain.last())
    report = evaluation.build_report(chain.workspace, chain, end)
    text = chain.workspace.artifacts.read(report, "report.html").decode()
    rows = saved_rows(results(chain.workspace))
    assert [label for label, _ in rows] == [
        "Saved policy, float32",
        "Rewards after are drawn from a bfloat16 copy",
    ]
    for label, value in rows:
        assert label in text
        assert value.replace(">", "&gt;") in text
    left = garbage([chain.workspace], datetime.now(UTC) + timedelta(days=1))
    assert not [each.what for each in left if "drawn" in each.what]


def test_an_engine_of_float32_draws_from_the_policy_itself(
    steps: Any, asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrpo_core.engines.numerics.native_bfloat16", lambda device: False)
    chain, _ = trained(steps, asked())
    copied = drawn_copy(chain.after(chain.last()).after.samples)
    assert copied is not None
    facts = copied.build().facts
    assert facts["dtype"] == "float32"
    assert facts["largest_difference"] < 1e-3


def test_adapters_beside_a_rounded_start_are_measured_as_they_are_used(
    steps: Any, asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM loads with vllm.merged off, computed here: the start's copy and bfloat16 adapters."""
    chain, _ = trained(steps, asked(training={"lora_rank": 4, "learning_rate": 1e-2}))
    samples = chain.after(chain.last()).after.samples
    adapters = samples.policy.directory / "adapter"
    monkeypatch.setattr(SampleStep, "adapters", adapters)
    copied = drawn_copy(samples)
    assert copied is not None
    facts = copied.build().facts
    assert facts["share"] == pytest.approx(1, abs=0.1)
    assert 0 < facts["largest_difference"] < 1


def test_only_a_policy_trained_here_has_a_copy_to_measure(
    steps: Any, asked: Callable[..., Experiment]
) -> None:
    chain, made = trained(steps, asked())
    assert drawn_copy(chain.before.samples) is None, "the reference is what it is"
    assert drawn_copy(chain.before.rewards) is None
    after = chain.after(chain.last()).after.samples
    assert drawn_copy(after) is not None
    older = replace(after, policy=replace(after.policy, made=replace(made, files={})))
    assert drawn_copy(older) is None
    fake = stored_chain(Workspace(asked(sampling={"engine": "fake"}))).before.samples
    assert drawn_copy(replace(fake, policy=after.policy)) is None, "the fake engine draws from no policy"


def test_a_refused_policy_is_saved_otherwise_without_training_again(
    steps: Any, asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrpo_core.rounding.stochastic_bfloat16", lambda tensor, name: tensor.bfloat16())
    small = {"learning_rate": 1e-5, "save_dtype": "bfloat16"}
    with pytest.raises(ModelError, match=r"set training\.save_dtype: float32; the training is kept"):
        trained(steps, asked(training=small))
    chain = stored_chain(Workspace(asked(training=small | {"save_dtype": "float32"})))
    assert chain.workspace.artifacts.find(chain.first.train) is None
    seen: list[int] = []
    data = chain.workspace.artifacts.get(chain.first.training_set)
    made = training.build(
        chain.workspace, chain.first.train, data, chain.first.start, lambda step, *_: seen.append(step)
    )
    assert seen == []
    assert made.facts["steps"] == len(json.loads(chain.workspace.artifacts.read(made, "history.json"))) > 0
    assert made.facts["saved"]["share"] == pytest.approx(1, abs=0.01)


def test_what_another_run_trains_in_is_left_to_it(
    steps: Any, asked: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one saves the same training in another precision, while this one commits its policy."""
    chain, _ = steps.precompute(asked())
    work = training.work_directory(chain.first.train)
    make = Workspace.make
    with contextlib.ExitStack() as other:

        def overtaken(workspace: Workspace, *given: Any) -> Manifest:
            made = make(workspace, *given)
            other.enter_context(alone(work / "lock"))
            return made

        monkeypatch.setattr(Workspace, "make", overtaken)
        data = chain.workspace.artifacts.get(chain.first.training_set)
        training.build(chain.workspace, chain.first.train, data, chain.first.start)
        assert (work / "trained").is_dir()


def test_two_precisions_are_two_policies_of_one_training(
    asked: Callable[..., Experiment], steps: Any
) -> None:
    steps.precompute(asked())
    workspaces = [Workspace(asked(training={"save_dtype": dtype})) for dtype in ("float32", "bfloat16")]
    one, two = (stored_chain(workspace).first.train for workspace in workspaces)
    assert one.key != two.key
    assert training.work_directory(one) == training.work_directory(two)
    longer = stored_chain(Workspace(asked(training={"epochs": 2}))).first.train
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
