"""A judge beside the reward: planted cases, laws, hand-made values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.judge_agreement import JudgeAgreement, judge_agreement, rank_correlation
from qrpo_core.evaluation.pool_report import judged_pool


def planted(
    kind: str, place: float = 0.7, *, prompts: int = 200, n: int = 50, seed: int = 3
) -> dict[str, Any]:
    """A pool of uniform rewards with 8 judged completions a prompt, and a judge that parts at `place`."""
    rng = np.random.default_rng(seed)
    reward, noise = rng.random((prompts, n)), rng.random((prompts, n))
    score = {
        "agrees": reward,
        "independent": noise,
        "opposite": -reward,
        # Above the place every completion is better than those below it, in random order.
        "saturates": np.where(reward < place, reward, place + (1 - place) * noise),
        # Above the place a completion is as good as any.
        "falls off": np.where(reward < place, reward, noise),
    }[kind]
    position = ((reward[:, None, :] < reward[:, :, None]).sum(2) + 0.5) / n
    columns = (reward, position, score, 1 + np.floor(100 * rng.random((prompts, n))))
    names = ("rewards", "position", "scores", "lengths")
    found = {name: column[:, :8].ravel() for name, column in zip(names, columns, strict=True)}
    return {"prompt": np.repeat(np.arange(prompts), 8), **found, "references": n}


def agreement(of: dict[str, Any], **how: Any) -> JudgeAgreement:
    return judge_agreement(**of, **{"resamples": 200, **how})


@pytest.mark.parametrize("kind", ["saturates", "falls off"])
@pytest.mark.parametrize("place", [0.5, 0.7, 0.9])
def test_the_place_where_judge_and_reward_part_is_in_its_interval(kind: str, place: float) -> None:
    found = agreement(planted(kind, place))
    assert found.follows
    assert found.stops_rising.low is not None
    assert found.stops_rising.high is not None
    assert found.stops_rising.low <= place <= found.stops_rising.high
    # A rank among n references has a standard error of at most 0.071 here, a group a width of 0.05.
    assert abs(found.stops_rising.value - place) <= 2 * np.sqrt(place * (1 - place) / 50) + 0.05
    assert (
        found.parts or place > 0.7 or kind == "falls off"
    )  # fewer rows above, or noisier ones, leave it open
    top = [group for group in found.groups if group.low >= found.stops_rising.value]
    assert len({group.fitted for group in top}) == 1


def test_a_judge_that_agrees_is_believed_to_the_top() -> None:
    found = agreement(planted("agrees"))
    assert found.agreement.value == 1
    assert found.stops_rising.value == 1
    assert not found.parts
    assert found.correlation is not None
    assert found.correlation.value == pytest.approx(1)
    assert [group.fitted for group in found.groups] == sorted(group.fitted for group in found.groups)


def test_an_independent_judge_is_not_followed_anywhere() -> None:
    found = agreement(planted("independent"))
    assert not found.follows
    assert not found.contradicts
    assert found.stops_rising.value == 0
    # Each of 5,600 pairs agrees with probability 1/2; those of a prompt share completions: variance < 4-fold.
    assert abs(found.agreement.value - 0.5) < 4 * 2 * 0.5 / np.sqrt(5600)
    assert judged_pool(8, {}, found, ratio=None, references=50).truncation is None


def test_a_noisy_judge_that_rises_to_the_top_never_parts() -> None:
    """Few rows at the top show no rise, so the place may be below it, but the rise is not ruled out."""
    for seed in range(5):
        of, rng = planted("agrees", seed=seed), np.random.default_rng(seed)
        of["scores"] = of["rewards"] + rng.normal(0, 0.5, len(of["rewards"]))
        found = agreement(of, resamples=100)
        assert found.follows
        assert not found.parts


def test_an_opposite_judge_contradicts() -> None:
    found = agreement(planted("opposite"))
    assert found.contradicts
    assert found.agreement.value == 0


def test_what_length_alone_explains_is_not_there_at_equal_length() -> None:
    """The reward is length with little noise, and so is the judge, with noise of its own."""
    of, rng = planted("independent"), np.random.default_rng(0)
    lengths = of["lengths"]
    of |= {name: lengths + rng.normal(0, 10, len(lengths)) for name in ("rewards", "scores")}
    found = agreement(of)
    assert found.follows
    assert found.length is not None
    assert found.length.value > 0.85
    assert found.correlation is not None
    assert found.correlation.value > 0.7
    assert found.beyond_length is not None
    assert abs(found.beyond_length.value) < 0.15  # the partial correlation of ranks is not exactly 0


def test_a_length_driven_reward_has_the_correlation_of_its_noise() -> None:
    rng, prompts = np.random.default_rng(1), np.repeat(np.arange(100), 8)
    lengths = rng.permutation(800) + 1.0
    assert rank_correlation(prompts, lengths**2, lengths, resamples=50).value == pytest.approx(1)  # type: ignore[union-attr]
    assert rank_correlation(prompts, -lengths, lengths, resamples=50).value == pytest.approx(-1)  # type: ignore[union-attr]
    assert rank_correlation(prompts, np.ones(800), lengths, resamples=50) is None
    assert rank_correlation([1, 2, 3], [1, 2, 3], [1, 2, 3], resamples=50) is None


def test_by_hand() -> None:
    """Two prompts. Pairs (higher first): 2>1 agrees, 3>1 ties, 3>2 disagrees; 5>4 agrees."""
    found = judge_agreement(
        [7, 7, 7, 9, 9],
        rewards=[1, 2, 3, 4, 5],
        position=[1 / 6, 3 / 6, 5 / 6, 1 / 6, 5 / 6],
        scores=[0.1, 0.9, 0.1, 0.2, 0.3],
        lengths=[1, 2, 3, 1, 2],
        references=3,
        resamples=50,
    )
    assert (found.prompts, found.rows, found.pairs) == (2, 5, 4)
    assert found.agreement.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.ties == 0.25
    # The judge's mid-ranks among the others: 0.25, 1, 0.25 and 0, 1.
    means = [(group.low, group.rows, group.judge.value) for group in found.groups]
    assert means == [(0, 2, 0.125), (1 / 3, 1, 1.0), (2 / 3, 2, 0.625)]
    assert [group.pairs for group in found.groups] == [4, 1, 0]
    assert [group.agreement and group.agreement.value for group in found.groups] == [0.625, 0, None]


def test_one_prompt_has_no_interval() -> None:
    of = planted("agrees", prompts=1)
    found = agreement(of)
    assert (found.agreement.low, found.stops_rising.low) == (None, None)
    assert found.follows


def test_bad_inputs() -> None:
    of = planted("agrees", prompts=2)
    with pytest.raises(DataError, match="no prompt has two judged completions"):
        agreement(of | {"rewards": np.ones(16)})
    with pytest.raises(DataError, match="no prompt has two judged completions"):
        agreement(of | {"prompt": np.arange(16)})


@given(
    st.integers(2, 6),
    st.integers(2, 6),
    st.integers(0, 2**31),
    st.sampled_from([np.exp, np.cbrt, lambda x: 3 * x - 7, lambda x: np.floor(1000 * x)]),
)
def test_only_the_order_of_either_counts(prompts: int, size: int, seed: int, increasing: Any) -> None:
    """Also where values tie; values are multiples of 1/4, which no map here merges."""
    rng = np.random.default_rng(seed)
    code = np.repeat(np.arange(prompts), size)
    rewards, scores = rng.integers(-4, 5, (2, prompts * size)) / 4
    rewards[:2] = (0.0, 1.0)  # a pair
    of = {
        "prompt": code,
        "rewards": rewards,
        "position": rng.random(len(code)),
        "scores": scores,
        "lengths": rng.integers(1, 9, len(code)),
        "references": size,
    }
    found = asdict(agreement(of, resamples=20))
    assert asdict(agreement(of | {"rewards": increasing(rewards)}, resamples=20)) == found
    assert asdict(agreement(of | {"scores": increasing(scores)}, resamples=20)) == found
    flipped = agreement(of | {"scores": -scores}, resamples=20)
    assert flipped.agreement.value == pytest.approx(1 - found["agreement"]["value"])
    order = rng.permutation(len(code))
    columns = {name: value if name == "references" else value[order] for name, value in of.items()}
    again = asdict(agreement(columns, resamples=20))
    assert again["agreement"]["value"] == pytest.approx(found["agreement"]["value"])
    assert again["stops_rising"]["value"] == found["stops_rising"]["value"]
