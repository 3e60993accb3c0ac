"""The comparison of variants: gains, ranks and resolved pairs by hand, failures, lengths."""

from __future__ import annotations

import numpy as np
import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.comparison import Observed, compare_scores, length_slope, variant_facts
from qrpo_core.evaluation.comparison_results import ComparisonResult, ScorerResult, VariantFacts
from qrpo_core.reporting.comparison_text import headline, pair_text, ranks
from qrpo_core.reporting.html.comparison_plots import frontier

PROMPTS, SEEDS = 40, 3


def observed(*gains: float, noise: float = 0.1) -> Observed:
    """Variants with these true gains: prompts differ, seeds and completions add noise."""
    rng = np.random.default_rng(1)
    before = rng.normal(size=PROMPTS)
    after = before + np.array(gains)[:, None, None]
    return Observed(before, after + noise * rng.normal(size=(len(gains), SEEDS, PROMPTS)))


def scored(seen: Observed, confidence: float = 0.95) -> ScorerResult:
    names = "abcdefg"[: seen.after.shape[0]]
    return compare_scores("reward", seen, tuple(names), confidence)


def result_of(facts: tuple[VariantFacts, ...], *scorers: ScorerResult) -> ComparisonResult:
    return ComparisonResult(
        (0, 1, 2), 0.9, PROMPTS, 4, facts, scorers, 3.0, {"reward": None}, (), "", True, ()
    )


def test_equal_policies_are_not_ahead_of_each_other() -> None:
    level = np.zeros((3, SEEDS, PROMPTS))
    level[2] = -1.0
    found = result_of((), scored(Observed(np.zeros(PROMPTS), level)))
    assert headline(found) == "a and b have the same reward, which is the highest."
    assert [ranks(found.scorers[0], name) for name in "abc"] == ["1, 1–2", "1, 1–2", "3"]


def test_gains_ranks_and_differences() -> None:
    found = scored(observed(0.5, 2.0, 0.505))
    assert [each.variant for each in found.variants] == ["b", "c", "a"]
    best, second, third = found.variants
    assert best.gain.value == pytest.approx(2.0, abs=0.1)
    assert (best.best_rank, best.worst_rank) == (1, 1)
    # The two others are not resolved from each other, so each may be second or third.
    assert [(each.best_rank, each.worst_rank) for each in (second, third)] == [(2, 3)] * 2
    assert ranks(found, "b") == "1"
    assert ranks(found, "a") == "3, 2–3"
    resolved = {each.names: each.resolved for each in found.pairs}
    assert resolved == {("a", "b"): True, ("a", "c"): False, ("b", "c"): True}
    text = pair_text(found.pairs[0])
    assert text.startswith("b over a: +1.5")
    assert text.endswith("p < 0.0001")


def test_prompts_shift_both_sides_and_change_nothing() -> None:
    seen = observed(0.5, 0.7)
    shift = 100 * np.arange(PROMPTS)
    moved = Observed(seen.before + shift, seen.after + shift)
    for one, other in zip(scored(seen).pairs, scored(moved).pairs, strict=True):
        assert other.difference.value == pytest.approx(one.difference.value, abs=1e-9)
        assert other.difference.low == pytest.approx(one.difference.low, abs=1e-9)


def test_equal_policies_are_not_resolved() -> None:
    seen = observed(0.3)
    twice = Observed(seen.before, np.concatenate([seen.after, seen.after]))
    (pair,) = scored(twice).pairs
    assert (pair.difference.value, pair.p_value, pair.resolved) == (0.0, 1.0, False)


def test_prompts_without_a_score_are_left_out_for_all_and_failed_trainings_are_not() -> None:
    seen = observed(0.5, 1.0)
    seen.after[0, 1, 3] = np.nan  # no score on one prompt by one policy
    seen.after[1, 2, :] = np.nan  # one training failed
    found = scored(seen)
    assert (found.prompts, found.left_out) == (PROMPTS - 1, 1)
    kept = np.arange(PROMPTS) != 3
    by_hand = np.mean(seen.after[1, :2][:, kept] - seen.before[kept])
    b = found.of("b")
    assert b is not None
    assert b.gain.value == pytest.approx(by_hand)
    # The difference uses the seeds that both have.
    paired = np.mean(seen.after[0, :2][:, kept] - seen.after[1, :2][:, kept])
    assert found.pairs[0].difference.value == pytest.approx(paired)
    seen.after[1] = np.nan
    alone = scored(seen)
    assert alone.of("b") is None
    assert alone.pairs == ()
    facts = variant_facts("b", 1, dict.fromkeys(("log_ratio", "tokens", "cut"), seen), {0: "no"}, 0.95)
    assert (facts.seeds, facts.kl, facts.tokens, facts.cut, facts.failed) == (
        0,
        None,
        None,
        None,
        {"0": "no"},
    )


def test_no_prompt_with_every_score_is_an_error() -> None:
    seen = observed(0.5)
    seen.before[:] = np.nan
    with pytest.raises(DataError, match="none of 40 held-out prompts"):
        scored(seen)


def test_the_slope_of_length_is_within_prompts() -> None:
    prompts = ["p", "p", "q", "q", "q"]
    tokens = np.array([10.0, 12.0, 100.0, 102.0, 104.0])
    # Longer prompts' answers score lower, but within a prompt two tokens bring one unit.
    rewards = np.array([5.0, 6.0, 0.0, 1.0, np.nan])
    assert length_slope(prompts, rewards, tokens) == pytest.approx(0.5)
    assert length_slope(["p", "q"], np.ones(2), np.ones(2)) is None
    assert length_slope(["p"], np.array([np.nan]), np.ones(1)) is None


def test_the_frontier_by_hand() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (0.5, 0.1)]
    assert frontier(points) == [(0.5, 0.1), (1.0, 0.5), (3.0, 0.9)]


def test_a_result_survives_json() -> None:
    seen = observed(0.5, 1.0)
    measures = dict.fromkeys(("log_ratio", "tokens", "cut"), seen)
    facts = tuple(variant_facts(name, place, measures, {}, 0.9) for place, name in enumerate("ab"))
    result = result_of(facts, scored(seen))
    assert ComparisonResult.from_dict(result.to_dict()) == result
    with pytest.raises(DataError, match="not a comparison: seeds"):
        ComparisonResult.from_dict(result.to_dict() | {"seeds": "none"})
