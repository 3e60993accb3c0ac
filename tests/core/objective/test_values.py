"""A*-PO's targets: values by hand, laws and limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective import rank_counts_table
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.objective.values import value_targets

REWARDS = st.lists(st.floats(-5, 5), min_size=2, max_size=9)


def targets(rewards: Any, references: Any, *, value_beta: float, beta: float = 0.1) -> CalibratedTargets:
    """The targets of completions of one prompt among references of the same prompt."""
    codes, among = np.zeros(len(rewards), int), np.zeros(len(references), int)
    counts = rank_counts_table(codes, rewards, among, references, in_pool=False)
    return value_targets(
        counts,
        rewards,
        codes,
        reference_prompt=among,
        reference_rewards=references,
        beta=beta,
        value_beta=value_beta,
    )


def test_the_value_by_hand() -> None:
    """Half of the references succeed, exp(1/value_beta) = 3: V = value_beta log 2."""
    value_beta = 1 / math.log(3)
    found = targets([0.0, 1.0], [0.0, 1.0, 0.0, 1.0], value_beta=value_beta, beta=0.25)
    value = value_beta * math.log(2)
    assert found.target.tolist() == pytest.approx([-value, 1 - value])
    assert found.log_ratio.tolist() == pytest.approx([-4 * value, 4 - 4 * value])
    assert (0.25 * found.log_partition).tolist() == pytest.approx([value, value])
    assert found.quantile.tolist() == [0.5, 1.0]
    assert found.transformed.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("value_beta", [1e-4, 0.5, 10.0])
def test_a_prompt_whose_references_all_fail_has_value_0(value_beta: float) -> None:
    found = targets([0.0, 0.0, 1.0], [0.0] * 5, value_beta=value_beta)
    assert found.target.tolist() == [0.0, 0.0, 1.0]
    assert found.log_partition.tolist() == [0.0] * 3


@given(REWARDS, st.floats(1e-4, 10))
def test_laws_of_the_value(rewards: list[float], value_beta: float) -> None:
    references = np.array(rewards)
    found = targets(references, references, value_beta=value_beta)
    value = references - found.target
    assert references.mean() - 1e-9 <= value[0] <= references.max() + 1e-9  # between the limits
    exponents = found.target / value_beta
    assert np.logaddexp.reduce(exponents) - math.log(len(exponents)) == pytest.approx(0, abs=1e-10)
    moved = targets(references + 3.0, references + 3.0, value_beta=value_beta)
    assert moved.target == pytest.approx(found.target, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(references))
    assert targets(references, references[order], value_beta=value_beta).target == pytest.approx(
        found.target, abs=1e-12
    )


def test_limits_of_the_temperature() -> None:
    references = [0.2, 0.5, 0.8]
    best = targets([0.5], references, value_beta=1e-4)
    assert float(best.target[0]) == pytest.approx(0.5 - 0.8 + 1e-4 * math.log(3), abs=1e-15)
    mean = targets([0.5], references, value_beta=1e6)
    assert float(mean.target[0]) == pytest.approx(0.0, abs=1e-6)


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 10))
def test_equal_rewards_have_target_0_exactly(reward: float, value_beta: float) -> None:
    assert targets([reward] * 3, [reward] * 4, value_beta=value_beta).target.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be finite"),
        ({"value_beta": -1.0}, "beta must be finite"),
        ({"rewards": [math.nan, 0.0]}, "NaN or infinite"),
        ({"reference_rewards": [0.0]}, "unequal length"),
        ({"prompt": [0, 7]}, "samples of prompts without references"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    known: dict[str, Any] = {"rewards": [0.0, 1.0], "prompt": [0, 0], "beta": 0.1, "value_beta": 0.5}
    known |= {"reference_prompt": [0, 0], "reference_rewards": [0.0, 1.0]}
    counts = rank_counts_table([0, 0], [0.0, 1.0], [0, 0], [0.0, 1.0], in_pool=False)
    given_ = known | changes
    with pytest.raises(ObjectiveError, match=message):
        value_targets(counts, given_.pop("rewards"), given_.pop("prompt"), **given_)
