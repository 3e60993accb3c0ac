"""Diagnostics: by hand, against loops, on held-out draws, and on the graded GSM8K completions with ties."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.diagnostics import (
    length_correlation,
    normalization_check,
    rank_uniformity,
    reward_diagnostics,
    saturation,
)
from qrpo_core.objective.quantiles import RankCounts, leave_one_out_counts, rank_counts_table
from qrpo_core.objective.targets import reference_targets
from qrpo_core.objective.transforms import get_transform


def test_diagnostics_by_hand():
    # prompt 3: 0 0 1; prompt 8: all 1; prompt 5: 1 2 2 0
    prompt = [3, 8, 5, 3, 5, 8, 5, 3, 5]
    rewards = [0.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0]
    found = reward_diagnostics(prompt, rewards)
    assert (found.prompts, found.references) == (3, 9)
    assert found.tie_rate == pytest.approx((2 + 2 + 2) / 9)
    assert found.largest_atom == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert (found.signal_free_prompts, found.signal_free_share) == (1, pytest.approx(1 / 3))
    assert found.ceiling == pytest.approx((0 + 1 + 1 / 2) / 3)
    assert math.isnan(found.length_correlation)


def test_diagnostics_of_a_ragged_table_equal_a_loop():
    rng = np.random.default_rng(0)
    prompt, rewards = rng.integers(0, 40, 400), rng.integers(0, 5, 400).astype(float)
    lengths = rng.integers(1, 200, 400)
    found = reward_diagnostics(prompt, rewards, lengths)
    atoms, ceiling, tied, free = [], [], 0, 0
    for p in np.unique(prompt):
        counts = Counter(rewards[prompt == p].tolist())
        total = sum(counts.values())
        atoms.append(max(counts.values()) / total)
        best = counts[max(counts)]
        ceiling.append(best / total if best > 1 else 0.0)
        tied += sum(count for count in counts.values() if count > 1)
        free += len(counts) == 1
    assert found.largest_atom == pytest.approx(np.mean(atoms))
    assert found.ceiling == pytest.approx(np.mean(ceiling))
    assert found.tie_rate == pytest.approx(tied / 400)
    assert found.signal_free_prompts == free


def test_saturation_by_hand():
    counts = RankCounts(np.array([0, 4, 1, 2, 0]), np.array([1, 0, 2, 2, 4]), np.full(5, 4))
    found = saturation(counts)
    assert (found.high, found.low) == (3 / 5, 2 / 5)  # rows 1, 3, 4 and rows 0, 4


def test_length_correlation_is_within_prompts():
    lengths = np.array([10, 100, 1000, 20, 200, 2000])
    prompt = np.array([0, 0, 0, 1, 1, 1])
    reward = np.array([1.0, 2.0, 3.0, 101.0, 102.0, 103.0])
    assert length_correlation(prompt, reward, lengths) == pytest.approx(1.0)
    assert length_correlation(prompt, -reward, lengths) == pytest.approx(-1.0)
    hard = np.array([0.0, 0.0, 0.0, 5.0, 5.0, 5.0])  # differs between prompts only
    assert math.isnan(length_correlation(prompt, hard + 0.1, lengths))
    by_hand = np.corrcoef([-1, 0, 1, 1, 0, -1], np.log([0.1, 1, 10, 0.1, 1, 10]))[0, 1]
    assert length_correlation(prompt, [-1, 0, 1, 1, 0, -1], lengths) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("n", [2, 50])
def test_held_out_references_are_calibrated_and_a_better_policy_is_not(n, binary):
    rng = np.random.default_rng(1)
    prompts = 2000

    def draw(size, shift=0.0):
        values = rng.normal(size=size) + shift
        return (values > 0.5).astype(float) if binary else values

    references, held_out, better = draw(prompts * n), draw(prompts), draw(prompts, 0.5)
    prompt, seeds = np.arange(prompts), np.arange(prompts, dtype=np.uint64)
    same, other = (
        rank_uniformity(rank_counts_table(prompt, rewards, np.repeat(prompt, n), references, False), seeds)
        for rewards in (held_out, better)
    )
    assert same.p_value > 0.01  # also at n = 2 and with ties: the grid k/n is not taken for misfit
    assert other.p_value < 1e-6
    assert other.statistic > 2 * same.statistic


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_diagnostics([0, 0], [1.0, np.nan]), "row 1: nan"),
        (lambda: reward_diagnostics([0, 0], [1.0, 2.0], [5]), "unequal"),
        (lambda: length_correlation([0], [1.0], [0]), "token counts >= 1"),
        (lambda: reward_diagnostics([], []), "no reference rewards"),
        (lambda: saturation(RankCounts(*np.zeros((3, 0), int))), "no samples"),
        (lambda: rank_uniformity(RankCounts(*np.zeros((3, 0), int)), np.zeros(0, np.uint64)), "no samples"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()


def test_graded_gsm8k_completions_with_ties_get_targets_that_fit(shared_file):
    """Four graded solutions for each of 400 questions, as each other's references: pass/fail, all ties."""
    lines = shared_file("data/gsm8k/model_solutions_400.jsonl").read_text().splitlines()
    kinds = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    correct = np.array(
        [[json.loads(line)[kind]["is_correct"] for kind in kinds] for line in lines], dtype=float
    )
    prompts, n = correct.shape
    prompt, rewards = np.repeat(np.arange(prompts), n), correct.ravel()
    solved = correct.sum(axis=1)
    signal_free = (solved == 0) | (solved == n)

    found = reward_diagnostics(prompt, rewards)
    assert found.signal_free_prompts == signal_free.sum()
    assert found.largest_atom == pytest.approx((np.maximum(solved, n - solved) / n).mean())
    assert found.tie_rate == np.where(np.isin(solved, [1, n - 1]), (n - 1) / n, 1.0).mean()

    beta = 0.003
    targets = reference_targets(prompt, rewards, transform=get_transform("identity"), beta=beta)
    assert targets.normaliser == "tie_aware"
    by_prompt = targets.target.reshape(prompts, n)
    assert (by_prompt[signal_free] == 0.0).all()
    mixed = ~signal_free
    assert (by_prompt[mixed][correct[mixed] == 1] > 0).all()
    assert (by_prompt[mixed][correct[mixed] == 0] < 0).all()
    success = -np.log(solved[mixed] / n)  # "condition on success"
    log_ratio = targets.log_ratio.reshape(prompts, n)[mixed]
    np.testing.assert_allclose(log_ratio.max(axis=1), success, rtol=1e-9)
    assert normalization_check(targets, prompt).mean == pytest.approx(1.0, abs=1e-9)

    paper = reference_targets(
        prompt,
        rewards,
        transform=get_transform("identity"),
        beta=beta,
        normaliser="population",
        tie_tolerance=1.0,
    )
    failing = (solved == 0)[prompt]
    assert paper.log_ratio[failing] == pytest.approx(
        5.8, abs=0.02
    )  # the published pairing reinforces failures
    assert normalization_check(paper, prompt).mean > 50
    ends = saturation(leave_one_out_counts(prompt, rewards))
    assert ends.high == pytest.approx(np.mean((rewards == 1) | failing))
