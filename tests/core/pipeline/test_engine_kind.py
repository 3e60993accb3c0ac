"""Which engine draws from which policy: a running server has the reference, and none that was trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from qrpo_core.config import ParityConfig, SamplingConfig
from qrpo_core.engines.kinds import KINDS, TRAINERS
from qrpo_core.pipeline import parity
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_steps import SampleStep

REFERENCE = Policy("reference", lambda: Path("reference"))
TRAINED = Policy("trained", lambda: Path("trained"), start=REFERENCE)


def step(policy: Policy, engine: str) -> SampleStep:
    experiment: Any = SimpleNamespace(sampling=SamplingConfig(engine=engine), parity=ParityConfig())
    return SampleStep(SimpleNamespace(experiment=experiment), policy, None, 4, "sample")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["transformers", "vllm", "fake"])
def test_an_engine_that_loads_the_policy_draws_from_any(engine: str) -> None:
    assert step(REFERENCE, engine).engine_kind is KINDS[engine]
    assert step(TRAINED, engine).engine_kind is KINDS[engine]


def test_every_engine_that_the_setting_names_has_a_kind() -> None:
    assert get_args(SamplingConfig.model_fields["engine"].annotation) == tuple(KINDS)
    assert all(kind.name == name for name, kind in KINDS.items())


def test_a_server_draws_from_the_reference_alone() -> None:
    assert step(REFERENCE, "endpoint").engine_kind is KINDS["endpoint"]
    assert step(TRAINED, "endpoint").engine_kind is TRAINERS
    assert parity.parity_check(step(REFERENCE, "endpoint")) is not None
    assert (
        parity.parity_check(step(TRAINED, "endpoint")) is None
    )  # nothing to compare: it is the trainer's own engine
    assert parity.parity_check(step(TRAINED, "vllm")) is not None
