"""Hand-made numbers, two roads to each interval, and the laws of the comparison."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import EvaluationInput
from qrpo_core.evaluation.metrics import bootstrap, evaluate_policies, prompt_means
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.reporting.summary import kl_name

FAST = EvaluationConfig(resamples=500)


def test_every_number_by_hand(side):
    before = side(
        {"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [None, 0.5]},
        logprobs=False,
        num_tokens=[1, 2, 3, 4, 5, 9],
        finish_reason=["stop", "stop", "stop", "stop", "length", "length"],
    )
    after = side(
        {"a": [1.0, 1.0], "b": [None, 1.0], "c": [None, None]},
        logprobs=True,
        num_tokens=[2, 2, 2, 2, 2, 2],
        policy_logprob=[-1.0, -1.0, -1.0, -1.0, -1.0, -1.0],
        ref_logprob=[-2.0, -4.0, -1.0, -1.0, -2.0, 0.0],
    )
    result = evaluate_policies(EvaluationInput(before, after, 1.0, 1.0), FAST)

    assert result.prompts == 2
    assert result.left_out == {"before": 0, "after": 1, "both": 0}
    assert (result.samples_min, result.samples_max) == (2, 2)
    assert result.before.reward.value == 0.25  # (1/2 + 0) / 2
    assert result.after.reward.value == 1.0  # b's failed completion does not count as 0
    assert result.difference.value == 0.75
    assert (result.improved, result.unchanged, result.worsened) == (2, 0, 0)
    # a: pairs 1-1 tie, 1-0 win, twice: (2 * 0.5 + 2) / 4; b: one after sample beats both.
    assert result.win_rate.value == (0.75 + 1.0) / 2
    assert result.tie_share == 0.25
    assert (result.before.mean_length, result.before.median_length) == (4.0, 3.5)
    assert (result.after.mean_length, result.after.median_length) == (2.0, 2.0)
    assert (result.before.truncation_rate, result.after.truncation_rate) == (2 / 6, 0.0)
    assert (result.before.completions, result.after.completions) == (6, 6)
    none = {"timeout": 0, "sandbox_error": 0, "too_long": 0, "endpoint_error": 0, "refused": 0}
    assert result.before.not_ok == {**none, "parse_error": 1}
    assert result.after.not_ok == {**none, "parse_error": 3}
    # Log-ratios 1, 3 | 0, 0 | 1, -1: all six count, whatever their reward's status.
    assert result.kl.value == pytest.approx(4 / 6)
    assert result.kl.per_token == pytest.approx(4 / 12)
    # Residual sums by prompt: 4 - 8/6, -8/6, -8/6; variance 3/2 * sum of squares / 36.
    squares = (4 - 8 / 6) ** 2 + 2 * (8 / 6) ** 2
    assert result.kl.standard_error == pytest.approx(math.sqrt(1.5 * squares / 36))
    assert result.kl.per_token_standard_error == pytest.approx(result.kl.standard_error / 2)


def test_left_out_prompts_are_counted_by_side(evaluated):
    result = evaluated(
        {"a": [1.0], "b": [None], "c": [0.0], "d": [None]}, {"a": [1.0], "b": [1.0], "c": [None], "d": [None]}
    )
    assert result.prompts == 1
    assert result.left_out == {"before": 1, "after": 1, "both": 1}


def test_interval_against_the_enumeratedbootstrap(pair):
    # Three differences 0, 1, 10: of the 27 equally likely resamples one has mean 0 and one mean 10, so the
    # 95 % percentile interval ends between the extremes (3.7 % each) on them.
    data = pair({"a": [0.0], "b": [0.0], "c": [0.0]}, {"a": [0.0], "b": [1.0], "c": [10.0]})
    result = evaluate_policies(data, EvaluationConfig(resamples=10_000))
    means = sorted(np.mean(draw) for draw in itertools.product([0.0, 1.0, 10.0], repeat=3))
    assert result.difference.low == pytest.approx(np.percentile(means, 2.5, method="inverted_cdf"))
    assert result.difference.high == pytest.approx(np.percentile(means, 97.5, method="inverted_cdf"))


def test_interval_against_the_normal_closed_form(pair, random_rewards):
    data = pair(random_rewards(1, 600, 2), random_rewards(2, 600, 2, shift=0.3))
    result = evaluate_policies(data, EvaluationConfig(resamples=4000))
    difference = prompt_means(data).difference
    half = 1.959964 * difference.std(ddof=1) / math.sqrt(600)
    assert result.difference.low == pytest.approx(difference.mean() - half, abs=0.06 * half)
    assert result.difference.high == pytest.approx(difference.mean() + half, abs=0.06 * half)


def test_interval_is_paired(pair, random_rewards):
    # The prompts' own means vary; the difference does not: its interval must be far narrower.
    rewards = random_rewards(1, 200, 1)
    result = evaluate_policies(pair(rewards, {p: [r[0] + 0.1] for p, r in rewards.items()}), FAST)
    assert result.difference.high - result.difference.low < 1e-12
    assert result.before.reward.high - result.before.reward.low > 0.1


def test_coverage_of_the_interval():
    """The nominal level is met on draws from a known population (mean 0.3), within 4 standard errors."""
    rng, hits, trials = np.random.default_rng(5), 0, 300
    for _ in range(trials):
        draws = rng.exponential(0.3, size=(1, 100))
        estimate = bootstrap(draws, EvaluationConfig(resamples=400))[0]
        hits += estimate.low <= 0.3 <= estimate.high
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_seed_and_confidence_reach_the_interval(pair, random_rewards):
    data = pair(random_rewards(1, 30, 2), random_rewards(2, 30, 2))
    first = evaluate_policies(data, FAST)
    assert evaluate_policies(data, FAST) == first
    other = evaluate_policies(data, EvaluationConfig(resamples=500, seed=1))
    assert other.difference.value == first.difference.value
    assert other.difference.low != first.difference.low
    wide = evaluate_policies(data, EvaluationConfig(resamples=500, confidence=0.99))
    assert wide.difference.low < first.difference.low < first.difference.high < wide.difference.high


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_row_order_changes_nothing(pair, random_rewards, random):
    rewards = random_rewards(3, 12, 3)
    rewards["p0003"][1] = None
    data = pair(rewards, random_rewards(4, 12, 3), num_tokens=list(range(1, 37)))
    order = list(range(36))
    random.shuffle(order)
    shuffled = EvaluationInput(data.before.take(order), data.after.take(order[::-1]), 1.0, 1.0)
    assert evaluate_policies(shuffled, FAST) == evaluate_policies(data, FAST)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.lists(st.integers(-3, 3), min_size=3, max_size=3)] * 2), min_size=1, max_size=6)
)
def test_laws_of_wins_and_differences(pair, prompts):
    before = {f"p{i}": [float(r) for r in b] for i, (b, _) in enumerate(prompts)}
    after = {f"p{i}": [float(r) for r in a] for i, (_, a) in enumerate(prompts)}
    means = prompt_means(pair(before, after))
    swapped = prompt_means(pair(after, before))
    np.testing.assert_allclose(means.win, 1 - swapped.win, atol=1e-12)
    np.testing.assert_array_equal(means.tie, swapped.tie)
    np.testing.assert_array_equal(means.difference, -swapped.difference)
    # The win rate sees the order alone: an increasing map of all rewards leaves it.
    mapped = [{p: [math.exp(r) for r in rs] for p, rs in one.items()} for one in (before, after)]
    np.testing.assert_array_equal(prompt_means(pair(*mapped)).win, means.win)
    # Against the plain double loop.
    pairs = [
        np.mean([(a > b) + 0.5 * (a == b) for a in after[p] for b in before[p]]) for p in means.prompt_ids
    ]
    np.testing.assert_allclose(means.win, pairs, atol=1e-12)


def test_rounding_is_not_a_change(evaluated):
    result = evaluated({"a": [0.1, 0.2, 0.3]}, {"a": [0.3, 0.3, 0.0]})
    assert (0.1 + 0.2 + 0.3) / 3 != (0.3 + 0.3 + 0.0) / 3  # what the case is about
    assert (result.improved, result.unchanged, result.worsened) == (0, 1, 0)


def categorical_samples(side, policy, reference):
    """The exact KL of two categorical policies; 4,000 samples of the first with their rewards and rows."""
    exact = float((policy * np.log(policy / reference)).sum())
    drawn = np.random.default_rng(0).choice(4, size=4000, p=policy)
    rewards = {f"p{i:03d}": [0.0] * 20 for i in range(200)}
    after = side(
        rewards,
        logprobs=True,
        policy_logprob=np.log(policy)[drawn].tolist(),
        ref_logprob=np.log(reference)[drawn].tolist(),
    )
    return exact, drawn, rewards, after


def test_kl_is_the_known_divergence_of_a_tabular_policy(side):
    """Samples of a categorical policy: the estimate is within 4 standard errors of the exact KL."""
    policy, reference = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.25, 0.25, 0.25])
    exact, drawn, rewards, after = categorical_samples(side, policy, reference)
    data = EvaluationInput(side(rewards, logprobs=False), after, 1.0, 1.0)
    kl = evaluate_policies(data, FAST).kl
    assert abs(kl.value - exact) < 4 * kl.standard_error
    # The draws are independent, so clustering changes little: the error is that of the plain mean.
    ratio = (np.log(policy) - np.log(reference))[drawn]
    assert kl.standard_error == pytest.approx(ratio.std(ddof=1) / math.sqrt(4000), rel=0.2)
    # With equal samples a prompt it is exactly the error of the prompt means.
    means = ratio.reshape(200, 20).mean(axis=1)
    assert kl.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(200), rel=1e-9)


def test_kl_note_says_when_it_is_none(side):
    tables = side({"a": [0.0]}, logprobs=False), side({"a": [0.0]}, logprobs=True)
    plain = evaluate_policies(EvaluationInput(*tables, 1.0, 1.0), FAST).kl
    assert plain.unbiased
    assert "unbiased estimate of KL(pi || pi_ref)" in plain.note
    assert plain.standard_error is None  # one prompt
    assert "both scored in float32 arithmetic" in plain.note
    assert (plain.arithmetic, plain.temperature) == ("float32", 1.0)
    tempered = evaluate_policies(EvaluationInput(*tables, 0.7, 1.0), FAST).kl
    assert tempered.unbiased
    assert tempered.temperature == 0.7
    assert "both policies softmax(logits / 0.7), as they are sampled at temperature 0.7" in tempered.note
    cut = evaluate_policies(EvaluationInput(*tables, 1.0, 0.9), FAST).kl
    assert not cut.unbiased
    assert "top_p 0.9" in cut.note
    assert "not an estimate of KL" in cut.note


def test_kl_of_tempered_policies_from_tempered_samples(side):
    """Drawn at T and scored at T it is the KL of the tempered policies; scored at 1 it would be neither."""
    temperature = 0.7
    logits = np.array([[1.0, 0.4, -0.3, -1.5], [0.1, 0.2, -0.1, 0.0]])
    policy, reference = np.exp(logits / temperature) / np.exp(logits / temperature).sum(1, keepdims=True)
    exact, _, rewards, after = categorical_samples(side, policy, reference)
    kl = evaluate_policies(EvaluationInput(side(rewards, logprobs=False), after, temperature, 1.0), FAST).kl
    assert abs(kl.value - exact) < 4 * kl.standard_error
    assert kl_name(kl) == "KL(policy || reference), float32 arithmetic, temperature 0.7"


def test_one_prompt_has_no_interval(evaluated):
    result = evaluated({"a": [0.0, 1.0]}, {"a": [1.0, 1.0]})
    assert result.difference.value == 0.5
    assert result.difference.low is None
    assert result.difference.high is None


def test_result_survives_json(evaluated, random_rewards):
    result = evaluated(random_rewards(1, 7, 2), random_rewards(2, 7, 2))
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompts": None}, "prompts"),
        ({"surprise": 1}, "surprise"),
        ({"tie_share": math.nan}, "tie_share"),
        ({"improved": "3"}, "improved"),
    ],
)
def test_damaged_results_are_refused(evaluated, change, named):
    stored = evaluated({"a": [0.0]}, {"a": [1.0]}).to_dict() | change
    with pytest.raises(DataError, match=named) as caught:
        EvaluationResult.from_dict(stored, "evaluate/abc")
    assert caught.value.where == "evaluate/abc"


REFUSED = {
    "empty": (lambda t: t.slice(0, 0), "no completions"),
    "twice": (lambda t: pa.concat_tables([t, t.slice(3, 1)]), "more than one row .*b:1"),
    "nan": (lambda t: _set(t, "reward", 2, math.nan), "reward is not finite .*b:0"),
    "infinite log-prob": (lambda t: _set(t, "policy_logprob", 1, -math.inf), "policy_logprob .*a:1"),
    "null log-prob": (lambda t: _set(t, "ref_logprob", 1, None), "'ref_logprob' is null in row 1"),
    "ok without reward": (lambda t: _set(t, "reward", 0, None), "status ok without a reward .*a:0"),
    "reward without ok": (lambda t: _set(t, "status", 0, "timeout"), "a reward without status ok .*a:0"),
    "status": (lambda t: _set(t, "status", 0, "fine"), "unknown status .*a:0"),
    "finish": (lambda t: _set(t, "finish_reason", 0, "eos"), "unknown finish_reason .*a:0"),
    "tokens": (lambda t: _set(t, "num_tokens", 0, -1), "num_tokens below 0 .*a:0"),
    "column": (lambda t: t.drop_columns(["ref_logprob"]), "missing column 'ref_logprob'"),
    "prompt": (lambda t: t.slice(0, 2), "1 prompts only in 'before': b"),
    "other prompt": (lambda t: _set(t, "prompt_id", 3, "z"), "1 prompts only in 'after': z"),
    "sample": (lambda t: t.slice(0, 3), "1 samples only in 'before': b:1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_tables_are_refused_by_row(side, case):
    damage, message = REFUSED[case]
    rewards = {"a": [0.0, 1.0], "b": [0.5, 0.5]}
    with pytest.raises(DataError, match=message):
        EvaluationInput(side(rewards, logprobs=False), damage(side(rewards, logprobs=True)), 1.0, 1.0)


def _set(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    return table.set_column(
        table.column_names.index(column), column, pa.array(values, table.schema.field(column).type)
    )


def test_nothing_to_compare_is_refused(pair):
    with pytest.raises(DataError, match="none of 2 held-out prompts"):
        evaluate_policies(pair({"a": [None], "b": [1.0]}, {"a": [1.0], "b": [None]}), FAST)


@pytest.mark.parametrize("settings_", [(0.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_sampling_settings_are_refused(side, settings_):
    tables = side({"a": [0.0]}, logprobs=False), side({"a": [0.0]}, logprobs=True)
    with pytest.raises(DataError, match="cannot be sampling settings"):
        EvaluationInput(*tables, *settings_)


def test_importing_is_light():
    """A cached run reads results and prints the table; it must not pay for plots or statistics."""
    code = (
        "import sys, qrpo_core.reporting.html.report, qrpo_core.reporting.summary;"
        "print([m for m in ('scipy.stats', 'matplotlib', 'torch', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
