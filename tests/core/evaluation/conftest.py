"""Builders of small evaluation tables; every test states the numbers it cares about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import EvaluationInput
from qrpo_core.evaluation.metrics import evaluate_policies
from qrpo_core.evaluation.results import EvaluationResult

Rewards = dict[str, list[float | None]]


def build_rows(rewards: Rewards, *, logprobs: bool, **columns: Any) -> list[dict[str, Any]]:
    """One row a reward; None is a parse error. `columns` are constants, or lists by row."""
    rows = []
    for prompt, values in rewards.items():
        for index, reward in enumerate(values):
            row: dict[str, Any] = {
                "prompt_id": prompt,
                "sample_index": index,
                "text": f"text of {prompt}:{index}",
                "num_tokens": 4,
                "finish_reason": "stop",
                "reward": reward,
                "status": "ok" if reward is not None else "parse_error",
            }
            if logprobs:
                row |= {"policy_logprob": -3.0, "ref_logprob": -4.0}
            place = len(rows)
            row |= {key: v[place] if isinstance(v, list) else v for key, v in columns.items()}
            rows.append(row)
    return rows


def build_table(rewards: Rewards, *, logprobs: bool, **columns: Any) -> pa.Table:
    rows = build_rows(rewards, logprobs=logprobs, **columns)
    kinds = {"reward": pa.float64(), "policy_logprob": pa.float64(), "ref_logprob": pa.float64()}
    return pa.table({key: pa.array([row[key] for row in rows], kinds.get(key)) for key in rows[0]})


@pytest.fixture(scope="session")
def side() -> Callable[..., pa.Table]:
    """side(rewards, logprobs=..., **columns) → a table."""
    return build_table


@pytest.fixture(scope="session")
def pair() -> Callable[..., EvaluationInput]:
    """pair(before, after, **after_columns) → an input at temperature 1 and top_p 1."""

    def make(before: Rewards, after: Rewards, **columns: Any) -> EvaluationInput:
        return EvaluationInput(
            build_table(before, logprobs=False),
            build_table(after, logprobs=True, **columns),
            temperature=1.0,
            top_p=1.0,
        )

    return make


@pytest.fixture(scope="session")
def evaluated(pair: Callable[..., EvaluationInput]) -> Callable[..., EvaluationResult]:
    """evaluated(before, after, **after_columns) → the result with 500 resamples."""
    return lambda before, after, **columns: evaluate_policies(
        pair(before, after, **columns), EvaluationConfig(resamples=500)
    )


@pytest.fixture(scope="session")
def random_rewards() -> Callable[..., Rewards]:
    """random_rewards(seed, prompts, samples, shift) → normal rewards by prompt, the prompts' means alike."""

    def make(seed: int, prompts: int, samples: int, shift: float = 0.0) -> Rewards:
        base = np.random.default_rng(99).normal(size=prompts)
        noise = np.random.default_rng(seed).normal(shift, 1.0, size=(prompts, samples))
        return {f"p{i:04d}": (base[i] + noise[i]).tolist() for i in range(prompts)}

    return make
