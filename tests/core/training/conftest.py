"""Trainings as jobs, and processes to run them in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example, Pair
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.store.checkpoint_store import CheckpointStore
from qrpo_core.training.launch import write_job
from qrpo_core.training.run import train_policy
from qrpo_core.training.survival import Outcome
from tests.core.training.runs import BETA, Train, load, simple_examples


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks processes that have imported everything: real ones, without 5 s of imports for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qrpo_core.training.run", "peft", "torch.distributed.checkpoint"])
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

    def make(stored: CheckpointStore | None = None, **training: Any) -> Path:
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
            stored=stored,
        )
        return folder / "job"

    return make


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    """Eleven completions of unequal length whose stored log-probs are the model's own."""
    random, model = np.random.default_rng(0), load(tiny_model)
    made = []
    for row in range(11):
        prompt, completion = (
            random.integers(0, 256, size=n).tolist() for n in (3 + row % 3, 2 + 3 * row % 7)
        )
        tokens = torch.tensor([[*prompt, *completion]])
        logprobs = model(input_ids=tokens).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        reference = float(logprobs.gather(1, torch.tensor(completion)[:, None]).sum().detach())
        target, reward = random.normal(size=2).tolist()
        made.append(Example(prompt, completion, target, BETA, reference, reward))
    return made


@pytest.fixture(scope="module")
def pairs(examples: list[Example]) -> list[Pair]:
    """Ten pairs, none of them tied: references that are not quite the model's."""
    neighbours = enumerate(pairwise(examples))
    return [Pair(replace(a, ref_logprob=a.ref_logprob - 0.1 * (i + 1)), b) for i, (a, b) in neighbours]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train a directory's policy on some rows; `out` and `work` lie beside each other."""

    def run(model: Path, name: str = "one", items: list[Any] | None = None, **training: Any) -> Outcome:
        on_step, work = training.pop("on_step", None), training.pop("work", "work")
        settings = {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3, "warmup_ratio": 0} | training
        return train_policy(
            items or simple_examples(24),
            model,
            tmp_path / name,
            objective=ObjectiveConfig(beta=0.1),
            training=TrainingConfig.model_validate(settings),
            work=tmp_path / work,
            on_step=on_step,
        )

    return run


@pytest.fixture
def saved_model(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model, saved again with tied embeddings or on the bfloat16 grid."""

    def make(*, tied: bool = False, dtype: str = "float32") -> Path:
        model = load_model(tiny_model, dtype)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        folder = tmp_path / "start"
        model.save_pretrained(folder)
        load_tokenizer(tiny_model).save_pretrained(folder)
        return folder

    return make
