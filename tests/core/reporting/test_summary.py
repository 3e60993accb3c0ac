"""Numbers are spelled once, and the sentence says what the interval says."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.common.formatting import decimals_for, number, percent, with_error
from qrpo_core.evaluation.results import Estimate
from qrpo_core.reporting.summary import normalisation, outcome, result_text, summary_rows


@pytest.mark.parametrize(
    ("value", "decimals", "signed", "text"),
    [
        (0.12345, 3, False, "0.123"),
        (0.12345, 3, True, "+0.123"),
        (-0.0001, 3, True, "0.000"),
        (0.0, 2, True, "0.00"),
        (-2.5, 1, True, "-2.5"),
        (1234567.8, 0, True, "+1,234,568"),
        (-3.2e12, 4, False, "-3.200e+12"),
    ],
)
def test_number(value, decimals, signed, text):
    assert number(value, decimals, signed=signed) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0 %"), (1e-5, "< 0.1 %"), (0.1234, "12.3 %"), (0.99999, "> 99.9 %"), (1.0, "100.0 %")],
)
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "width", "decimals"),
    [(0.33, 0.021, 3), (1234.0, 150.0, 0), (0.33, None, 3), (0.0, None, 3), (5.0, 1e-30, 9), (12.0, 3.0, 1)],
)
def test_decimals(value, width, decimals):
    assert decimals_for(value, width) == decimals


def test_with_error():
    assert with_error(1.2345, 0.052, "nats") == "1.234 ± 0.052 nats"
    assert with_error(1.2345, None, "nats") == "1.23 nats"


@pytest.fixture
def result(evaluated, random_rewards):
    return evaluated(random_rewards(1, 40, 3), random_rewards(2, 40, 3, shift=0.5))


def test_rows_spell_each_number_once(result):
    rows, text = dict(summary_rows(result)), result_text(result)
    assert rows["Mean reward before (95 % interval)"] == f"{text['before']} {text['before_interval']}"
    assert rows["Difference, paired (95 % interval)"].startswith(text["difference"] + " [+")
    assert rows["KL(policy || reference), float32 arithmetic ± standard error"] == "1.00 ± 0.00 nats"
    assert rows["Completions without a reward, before"] == "0 of 120"
    assert rows["Prompts left out"] == "0 of 40"
    assert rows["Held-out prompts compared"] == "40, 3 completions each a side"
    for part in (text["before"], text["after"], text["difference"], text["difference_interval"]):
        assert part in str(outcome(result))
    # Two significant digits of the half width, the same decimals in all three rewards.
    places = {len(text[name].partition(".")[2]) for name in ("before", "after", "difference")}
    assert len(places) == 1


def test_rows_name_what_failed(evaluated):
    result = evaluated({"a": [1.0, 0.0], "b": [None, None]}, {"a": [None, 1.0], "b": [1.0, 1.0]})
    rows = dict(summary_rows(result))
    assert rows["Completions without a reward, before"] == "2 of 4 (parse_error 2)"
    assert rows["Prompts left out"] == "1 of 2 (no ok reward before: 1)"
    assert rows["Difference, paired (95 % interval)"].endswith("(one prompt: no interval)")


def test_rows_do_not_call_a_log_ratio_a_kl(result):
    other = dataclasses.replace(result, kl=dataclasses.replace(result.kl, unbiased=False))
    assert not any("KL(policy" in label for label, _ in summary_rows(other))


def _with_difference(result, value, low, high):
    return dataclasses.replace(result, difference=Estimate(value, low, high))


@pytest.mark.parametrize(
    ("low", "high", "verdict", "verb", "caution"),
    [
        (0.1, 0.3, "good", "rose", ""),
        (-0.3, -0.1, "bad", "fell", "worse than the reference"),
        (-0.1, 0.5, "unclear", "went", "includes zero: no change is shown."),
        (-0.5, 0.1, "unclear", "went", "includes zero: no change is shown, and what there is is negative."),
        (0.0, 0.4, "unclear", "went", "includes zero"),
    ],
)
def test_outcome_follows_the_interval(result, low, high, verdict, verb, caution):
    found = outcome(_with_difference(result, (low + high) / 2, low, high))
    assert found.verdict == verdict
    assert f"Mean reward {verb} from" in found.sentence
    assert caution in found.caution
    assert bool(found.caution) == bool(caution)


def test_outcome_warns_of_few_prompts_and_of_failures(evaluated, random_rewards):
    few = outcome(evaluated(random_rewards(1, 8, 2), random_rewards(2, 8, 2, shift=5.0)))
    assert few.verdict == "good"
    assert "fewer than 20 prompts" in few.caution
    rewards = random_rewards(1, 30, 2)
    rewards["p0001"][0] = None
    failed = outcome(evaluated(rewards, random_rewards(2, 30, 2, shift=5.0)))
    assert "1 of 60 completions before have no reward" in failed.caution


def test_outcome_of_one_prompt(evaluated):
    found = outcome(evaluated({"a": [0.5, None]}, {"a": [0.25, 0.25]}))
    assert found.verdict == "unclear"
    assert (
        found.sentence == "Mean reward went from 0.500 to 0.250 on 1 held-out prompt, a difference of -0.250."
    )
    assert "One prompt allows no interval" in found.caution
    assert "1 of 2 completions before have no reward" in found.caution


def test_outcome_of_no_change(evaluated):
    same = {f"p{i}": [0.5, 0.5] for i in range(25)}
    found = outcome(evaluated(same, same))
    assert found.verdict == "unclear"
    assert (
        found.sentence == "Mean reward did not change on any of 25 held-out prompts: 0.500 before and after."
    )


def facts(mean, expected, error, normaliser="population", prefix="normalisation"):
    return {
        f"{prefix}_mean": mean,
        f"{prefix}_expected": expected,
        f"{prefix}_standard_error": error,
        "normaliser": normaliser,
    }


@pytest.mark.parametrize(
    ("mean", "expected", "error", "verdict", "words"),
    [
        (1.64, 1.64, 0.0, "good", "As normaliser"),  # Jensen, not 1
        (1.60, 1.64, 0.05, "good", "As normaliser"),
        (1.66, 1.64, 1e-9, "good", "As normaliser"),
        (3.46, 1.1, 0.1, "bad", "Far from"),
        (1.0, 1.64, 0.01, "bad", "Far from"),
        (1.5, 1.1, 0.2, "unclear", "too noisy"),
        (1.0, 1.0, 0.4, "unclear", "too noisy"),
        (math.inf, 1.0, 0.1, "bad", "Far from"),
    ],
)
def test_normalisation_verdict(mean, expected, error, verdict, words):
    (found,) = normalisation(facts(mean, expected, error))
    assert found.verdict == verdict
    assert words in found.meaning
    assert ("try normaliser: tie_aware" in found.meaning) == (verdict == "bad")
    assert f"({expected:.3g} expected)" in found.numbers
    assert found.numbers.startswith("inf" if math.isinf(mean) else f"{mean:.2f}"[:3])


def test_normalisation_of_held_out_references_and_of_nothing():
    held_out = facts(1.31, None, 0.02, "tie_aware", "held_out")
    first, second = normalisation(facts(1.2, 1.2, 0.0, "tie_aware") | held_out)
    assert (first.where, first.verdict) == ("", "good")
    assert (second.where, second.verdict) == ("held-out references", "unclear")
    assert "expected" not in second.numbers
    (bad,) = normalisation(facts(2.0, 1.0, 0.01, "tie_aware"))
    assert "the targets are not those of this data" in bad.meaning
    assert normalisation({}) == []
    with pytest.raises(DataError, match="normalisation_mean is NaN"):
        normalisation({"normalisation_mean": math.nan})
