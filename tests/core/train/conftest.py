"""Trainings as jobs, and processes to run them in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.train.launch import write_job


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks processes that have imported everything: real ones, without 5 s of imports for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qrpo_core.train.run", "peft", "torch.distributed.checkpoint"])
    return context


@pytest.fixture(scope="module")
def make_job(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A job directory of EXAMPLES examples, which the test's module says; training settings by name.

    In float32 if nothing else is said: "bf16" is bfloat16 on one machine and float32 on another.
    """
    draw = np.random.default_rng(0)
    items = [
        Example(
            draw.integers(0, 256, 3 + row % 4).tolist(),
            draw.integers(0, 256, 2 + row % 7).tolist(),
            target=float(draw.normal()),
            beta=0.5,
            ref_logprob=float(-10 - draw.random()),
        )
        for row in range(request.module.EXAMPLES)
    ]

    def make(**training: Any) -> Path:
        folder = tmp_path_factory.mktemp("training")
        settings = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-3, "checkpoint_minutes": 0}
        settings |= {"precision": "fp32"} | training
        write_job(
            items,
            tiny_model,
            folder / "policy",
            folder / "job",
            objective=ObjectiveConfig(beta=0.5),
            training=TrainingConfig.model_validate(settings),
        )
        return folder / "job"

    return make
