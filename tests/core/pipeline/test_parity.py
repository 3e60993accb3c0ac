"""The parity gate: its figures by hand, and that engines which differ are refused before any work."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qrpo_core.common.errors import EngineError
from qrpo_core.engines.base import Engine
from qrpo_core.engines.kinds import EngineKind
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.maintenance.gc import garbage
from qrpo_core.models.loading import load_model
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.parity import ParityCheck, figures, parity_check
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed


def test_the_mean_is_over_tokens_and_the_worst_rows_come_first() -> None:
    ours = [np.array([-1.0, -2.0]), np.array([-3.0]), np.array([-1.0])]
    theirs = [np.array([-1.0, -2.0 + math.log(2)]), np.array([-3.0 - math.log(3)]), np.array([-1.0])]
    found = figures(["a", "b", "c"], ours, theirs)
    assert found["tokens"] == 4
    assert found["mean"] == pytest.approx((1 + 2 + 3 + 1) / 4)
    assert found["largest"] == pytest.approx(3)
    assert [row["prompt_id"] for row in found["worst"]] == ["b", "a", "c"]
    assert found["worst"][1]["mean"] == pytest.approx(1.5)


def test_a_token_that_one_side_never_gives_is_infinitely_far() -> None:
    found = figures(["a"], [np.array([-math.inf])], [np.array([-2.0])])
    assert found["mean"] == math.inf
    assert figures(["a"], [np.array([-math.inf])], [np.array([-math.inf])])["mean"] == math.inf


@pytest.fixture
def step(settings: dict[str, Any]) -> SampleStep:
    """The sampling step of an experiment whose engine is another implementation than the trainer's."""
    asked = changed(
        settings,
        sampling={"engine": "endpoint"},
        endpoint={"url": "http://127.0.0.1:9/v1"},
        parity={"rows": 3},
    )
    workspace = Workspace(asked)
    prompts.build(workspace, prompts.recipe(workspace))
    samples, _ = reference_steps(workspace)
    return samples


def with_sampler(step: SampleStep, monkeypatch: pytest.MonkeyPatch, sampler: Engine) -> None:
    """Let another engine stand behind the endpoint; the trainer's is the real one."""
    real = Workspace.engine

    def engine(self: Workspace, directory: Path, *, kind: EngineKind, **how: Any) -> Engine:
        return sampler if kind.name == "endpoint" else real(self, directory, kind=kind, **how)

    monkeypatch.setattr(Workspace, "engine", engine)


def perturbed(directory: Path, folder: Path, by: float) -> TransformersEngine:
    """The policy with its weights moved: what stands behind an endpoint that serves another one."""
    model = load_model(directory, "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder)
    return TransformersEngine(folder, "float32", 8)


def test_the_same_policy_passes_once_and_for_all(
    step: SampleStep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_sampler(step, monkeypatch, perturbed(step.policy.directory, tmp_path / "same", 0.0))
    asked = parity_check(step)
    assert isinstance(asked, ParityCheck)
    drawn = 0

    def progress(rows: int) -> None:
        nonlocal drawn
        drawn += rows

    made = asked.build(progress)
    assert made.facts["rows"] == drawn == 3
    assert 1.0 <= made.facts["mean"] < 1.001
    assert made.facts["bos_tokens"] <= 1
    assert made.facts["stop_token_ids"]
    again = parity_check(step)
    assert again is not None
    again.build(progress)
    assert drawn == 3, "made once a policy and engine"
    left = garbage([step.workspace], datetime.now(UTC) + timedelta(days=1)).garbage
    assert not [each.what for each in left if "parity" in each.what]


def test_another_policy_is_refused_with_the_rows_that_differ_most(
    step: SampleStep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_sampler(step, monkeypatch, perturbed(step.policy.directory, tmp_path / "other", 2.0))
    asked = parity_check(step)
    assert asked is not None
    with pytest.raises(EngineError, match=r"parity.limit is 1.05") as caught:
        asked.build(lambda rows: None)
    assert any(prompt in str(caught.value.where) for prompt in step.prompts["prompt_id"].to_pylist())
    assert step.workspace.artifacts.find(asked.recipe) is None


def test_no_gate_where_nothing_can_differ(settings: dict[str, Any], step: SampleStep) -> None:
    for engine in ("fake", "transformers"):
        samples, rewards = reference_steps(Workspace(changed(settings, sampling={"engine": engine})))
        assert parity_check(samples) is None
        assert parity_check(rewards) is None
    none = changed(
        settings,
        sampling={"engine": "endpoint"},
        endpoint={"url": "http://127.0.0.1:9/v1"},
        parity={"rows": 0},
    )
    assert parity_check(reference_steps(Workspace(none))[0]) is None
