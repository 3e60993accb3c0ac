"""Which engine draws from which policy: a running server has the reference, and none that was trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qrpo_core.config import ParityConfig, SamplingConfig
from qrpo_core.steps import parity
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.policies import Policy

REFERENCE = Policy("reference", lambda: Path("reference"))
TRAINED = Policy("trained", lambda: Path("trained"), start=REFERENCE)


def step(policy: Policy, engine: str) -> SampleStep:
    experiment: Any = SimpleNamespace(sampling=SamplingConfig(engine=engine), parity=ParityConfig())
    return SampleStep(SimpleNamespace(experiment=experiment), policy, None, 4, "sample")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["transformers", "vllm", "fake"])
def test_an_engine_that_loads_the_policy_draws_from_any(engine: str) -> None:
    assert step(REFERENCE, engine).engine_kind == engine
    assert step(TRAINED, engine).engine_kind == engine


def test_a_server_draws_from_the_reference_alone() -> None:
    assert step(REFERENCE, "endpoint").engine_kind == "endpoint"
    assert step(TRAINED, "endpoint").engine_kind == "transformers"
    assert parity.gate(step(REFERENCE, "endpoint")) is not None
    assert (
        parity.gate(step(TRAINED, "endpoint")) is None
    )  # nothing to compare: it is the trainer's own engine
    assert parity.gate(step(TRAINED, "vllm")) is not None
