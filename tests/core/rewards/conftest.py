"""Tiny sequence classifiers with known weights over the tiny model's bytes tokenizer; scores of programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import Score
from qrpo_core.rewards.code.reward import CodeReward
from tests.core.rewards.code_problems import request

#: Sizes that every architecture here understands.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def write_classifier(
    folder: Path, tokenizer: Any, architecture: str, *, labels: int = 1, pad: bool = True, **settings: Any
) -> Path:
    """A random classifier with the same weights every time. pad: whether its config names the padding."""
    import torch
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer), num_labels=labels, **{**SIZES, **settings}
    )
    config.pad_token_id = tokenizer.pad_token_id if pad else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write_classifier` into a new folder, with the tiny model's tokenizer changed by `tokenizer`."""
    from transformers import AutoTokenizer

    def make(architecture: str, *, tokenizer: dict[str, Any] | None = None, **settings: Any) -> Path:
        found = AutoTokenizer.from_pretrained(tiny_model)
        for name, value in (tokenizer or {}).items():
            setattr(found, name, value)
        return write_classifier(tmp_path_factory.mktemp(architecture), found, architecture, **settings)

    return make


@pytest.fixture
def score() -> Any:
    """Return a function that scores one program with the reward `code`."""

    def judged(program: str, ground_truth: str, form: Any = "mbpp", **settings: Any) -> Score:
        reward = CodeReward(CodeRewardConfig(format=form, memory_mb=512, **settings))
        return reward.score([request(program, ground_truth)])[0]

    return judged
