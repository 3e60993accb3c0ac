"""The tie-aware normaliser: goldens, another road, its limits, laws and refusals (method.md, section 3.7)."""

from __future__ import annotations

import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective import log_partition
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.targets import calibrated_targets, reference_targets
from qrpo_core.objective.tie_aware import tie_aware_log_partition
from qrpo_core.objective.transforms import get_transform

IDENTITY = get_transform("identity")
GOLDEN = json.loads(Path(__file__).with_name("tie_aware_partition.json").read_text())

TRANSFORMS = [
    ("identity", {}),
    ("log", {}),
    ("square", {}),
    ("sqrt", {}),
    ("power", {"exponent": 1 / 3}),
    ("power", {"exponent": 7.0}),
    ("normal", {}),
    ("scaled_normal", {"mean": 0.3, "std": 2.0}),
    ("custom", {"f": lambda t: np.minimum(2 * t, 1.0) ** 2}),
]
BETAS = [1e-5, 3e-4, 0.003, 0.1, 0.5, 1.0, 5.0, 1e3]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case):
    rewards, atoms = GOLDEN[case]["rewards"], GOLDEN[case]["atoms"]
    for name, tie_method, beta, expected in GOLDEN[case]["log_z"]:
        found = tie_aware_log_partition(
            get_transform(name), float(beta), np.zeros(len(rewards), int), rewards, tie_method=tie_method,
            atoms=atoms,
        )  # fmt: skip
        assert found[0] == pytest.approx(float(expected), rel=1e-12, abs=0), (name, tie_method, beta)


def exact(f, rewards, atoms, tie_method, beta):
    """log Z at 30 digits: a loop over distinct rewards, each stretch by quadrature of its own."""
    n, upto, z = len(rewards), 0, mpmath.mpf(0)
    for value in sorted(set(rewards)):
        count = rewards.count(value)
        upto += count
        low, high = mpmath.mpf(upto - count) / n, mpmath.mpf(upto) / n
        if value in atoms and tie_method != "randomized":
            q = {"weak": high, "mid": (low + high) / 2, "strict": low}[tie_method]
            z += mpmath.mpf(count) / n * mpmath.exp(f(q) / beta)
        else:
            z += mpmath.quad(lambda t: mpmath.exp(f(t) / beta), mpmath.linspace(low, high, 9))
    return mpmath.log(z)


POWERS = {"identity": 1, "square": 2, "sqrt": 0.5}


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict", "randomized"])
@pytest.mark.parametrize("name", ["identity", "square", "sqrt"])
def test_every_tie_method_equals_quadrature_of_each_stretch(name, tie_method):
    rewards, atoms = [0.0, 0.0, 0.1, 0.4, 0.4, 0.4, 0.6, 0.7, 0.9], {0.0, 0.4, 0.9}
    with mpmath.workdps(30):
        for beta in (0.01, 0.1, 1.0, 1e3):
            expected = exact(lambda t: t ** POWERS[name], rewards, atoms, tie_method, beta)
            found = tie_aware_log_partition(
                get_transform(name), beta, [0] * 9, rewards, tie_method=tie_method, atoms=list(atoms)
            )
            assert abs(found[0] / expected - 1) < 1e-12


def stretch(name, params, low, high, beta):
    """The log of the mean over the stretch from closed forms at 60 digits, and the size of its terms."""
    with mpmath.workdps(60):
        u, a, b = 1 / mpmath.mpf(beta), mpmath.mpf(low), mpmath.mpf(high)
        if name == "log":
            value = (b ** (u + 1) - a ** (u + 1)) / (u + 1)
        else:
            p = mpmath.mpf(POWERS.get(name) or params["exponent"])
            upper, lower = (x * mpmath.hyp1f1(1 / p, 1 / p + 1, u * x**p) if x else 0 for x in (b, a))
            value = upper - lower
        return mpmath.log(value / (b - a))


@pytest.mark.parametrize(("name", "params"), TRANSFORMS[:6])
def test_a_stretch_keeps_twelve_digits_however_short_and_at_every_beta(name, params):
    transform = get_transform(name, **params)
    for n in (2, 64, 5000):
        for low, high in {(0, n), (0, 1), (n - 1, n), (n // 2, n // 2 + 1), (1, n)}:
            for beta in BETAS:
                found = float(transform.log_mean(low / n, high / n, beta))
                expected = stretch(name, params, low / n, high / n, beta)
                assert abs(found / expected - 1) < 1e-12, (n, low, high, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_stretches_of_the_normal_transform_add_up_to_the_population(beta):
    edges = np.array([0.0, 1e-3, 0.1, 0.5, 0.5 + 1 / 64, 0.9, 0.999, 1.0])
    for transform in (get_transform("normal"), get_transform("scaled_normal", mean=-0.2, std=0.7)):
        values = transform.log_mean(edges[:-1], edges[1:], beta)
        total = np.logaddexp.reduce(values + np.log(np.diff(edges)))
        assert total == pytest.approx(float(transform.log_partition(beta)), rel=1e-13, abs=1e-15)
        assert (np.diff(values) > 0).all()  # a mean over higher quantiles is higher


def test_a_short_stretch_of_the_normal_transform_by_quadrature():
    transform = get_transform("normal")
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for low, high in [(0.3, 0.32), (0.5, 0.51), (0.97, 0.98), (0.01, 0.6)]:
        t = low + (high - low) * 0.5 * (nodes + 1)
        for beta in (0.05, 0.4, 1.0, 1.9, 2.1, 30.0):
            values = transform.apply(t) / beta
            expected = values.max() + np.log(np.exp(values - values.max()) @ weights / 2)
            assert float(transform.log_mean(low, high, beta)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict", "randomized"])
@pytest.mark.parametrize(("name", "params"), TRANSFORMS)
def test_without_ties_every_tie_method_gives_the_population(name, params, tie_method):
    transform, rng = get_transform(name, **params), np.random.default_rng(0)
    prompt = np.repeat(np.arange(20), rng.integers(4, 20, 20))
    rewards = rng.permutation(len(prompt)).astype(float)
    for beta in BETAS:
        found = tie_aware_log_partition(transform, beta, prompt, rewards, tie_method=tie_method)
        np.testing.assert_allclose(found, float(transform.log_partition(beta)), rtol=1e-14)


@pytest.mark.parametrize(("name", "params"), TRANSFORMS[:-1])
def test_randomized_gives_the_population_with_ties_too(name, params):
    transform = get_transform(name, **params)
    prompt, rewards = np.repeat([0, 1], 6), [0.0, 0, 0, 1, 1, 2, 5, 5, 5, 5, 5, 5]
    for beta in BETAS:
        found = tie_aware_log_partition(transform, beta, prompt, rewards, tie_method="randomized")
        np.testing.assert_allclose(found, float(transform.log_partition(beta)), rtol=1e-12, atol=1e-15)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.sampled_from(TRANSFORMS[:4]),
    st.sampled_from(["weak", "mid", "strict"]),
    st.floats(1e-3, 10),
)
def test_with_atoms_alone_it_is_the_plug_in_sum(grades, which, tie_method, beta):
    """Sum over references of exp(f(q)/beta)/n, each with itself among the references."""
    transform, rewards = get_transform(which[0], **which[1]), np.array(grades, float)
    below, equal = ((rewards[:, None] > rewards).sum(1), (rewards[:, None] == rewards).sum(1))
    q = {"weak": below + equal, "mid": below + equal / 2, "strict": below}[tie_method] / len(rewards)
    f = transform.apply(q)
    if not np.isfinite(f).all():  # log of a strict quantile 0
        if len(rewards) < 2:
            return
        f = transform.apply(q, len(rewards))
    found = tie_aware_log_partition(
        transform, beta, [0] * len(rewards), rewards, tie_method=tie_method, atoms=range(5)
    )
    expected = np.logaddexp.reduce(f / beta) - np.log(len(rewards))
    assert found[0] == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("tie_method", ["weak", "mid", "strict"])
@pytest.mark.parametrize(("name", "params"), TRANSFORMS)
def test_a_prompt_with_equal_rewards_has_targets_of_exactly_zero(name, params, tie_method):
    prompt, rewards = np.repeat([0, 1, 2], 5), [3.0] * 5 + [0.1, 0.2, 0.3, 0.3, 0.4] + [-7.0] * 5
    for beta in BETAS:
        targets = reference_targets(
            prompt, rewards, transform=get_transform(name, **params), beta=beta, tie_method=tie_method
        ).target.reshape(3, 5)
        assert (targets[[0, 2]] == 0.0).all()
        assert (targets[1] != 0.0).any()


def test_scaled_normal_by_prompt_equals_one_transform_for_each_prompt():
    rng = np.random.default_rng(2)
    prompt, rewards = np.repeat(np.arange(5), 7), rng.integers(0, 5, 35) + np.repeat([0, 0, 0, 0.25, 0], 7)
    mean, std = rng.normal(size=5), np.array([1.0, 0.4, 0.0, 2.0, 1.0])
    together = reference_targets(
        prompt, rewards, transform=get_transform("scaled_normal", mean=mean, std=std), beta=0.4
    )
    for p in range(5):
        one = get_transform("scaled_normal", mean=mean[p], std=std[p])
        alone = reference_targets(prompt, rewards, transform=one, beta=0.4)
        mine = prompt == p
        np.testing.assert_allclose(together.log_partition[mine], alone.log_partition[mine], rtol=1e-13)


PROMPTS, N = 600, 10  # 6,000 rewards


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-4, 10), st.sampled_from(["weak", "mid", "strict"]))
def test_one_planted_tie_among_6000_rewards_moves_no_target_by_more_than_1_over_n_allows(
    seed, beta, tie_method
):
    """Each piece of (0, 1) moves by at most 2/n where two rewards become one atom, and a log of a mean of
    exponentials moves by no more than its terms: |beta log Z - its old value| <= 2/n for the identity. The
    quantile of a reference among n - 1 moves by at most 1/(n - 1). Other prompts do not move at all."""
    rng = np.random.default_rng(seed)
    prompt, rewards = np.repeat(np.arange(PROMPTS), N), rng.random(PROMPTS * N)
    before = reference_targets(prompt, rewards, transform=IDENTITY, beta=beta, tie_method=tie_method)
    where = int(rng.integers(PROMPTS))
    ranked = where * N + np.argsort(rewards[where * N : (where + 1) * N])
    rank = int(rng.integers(N - 1))
    tied = rewards.copy()
    tied[ranked[rank]] = tied[ranked[rank + 1]]
    after = reference_targets(prompt, tied, transform=IDENTITY, beta=beta, tie_method=tie_method)
    moved = np.abs(after.target - before.target)
    assert (moved[prompt != where] == 0.0).all()
    assert moved.max() <= 2 / N + 1 / (N - 1) + 1e-12
    assert after.normaliser == before.normaliser == "tie_aware"


@given(st.integers(0, 2**31), st.sampled_from([TRANSFORMS[0], *TRANSFORMS[2:6]]))  # log is clamped at 0
def test_invariant_under_row_order_and_increasing_maps_and_ordered_by_tie_method(seed, which):
    rng = np.random.default_rng(seed)
    transform, beta = get_transform(which[0], **which[1]), float(rng.uniform(0.01, 5))
    prompt = np.repeat(np.arange(6), 5)
    rewards = np.where(rng.random(30) < 0.5, rng.integers(0, 3, 30), rng.random(30) * 3)
    order = rng.permutation(30)
    weak, mid, randomized, strict = (
        tie_aware_log_partition(transform, beta, prompt, rewards, tie_method=tie_method)
        for tie_method in ("weak", "mid", "randomized", "strict")
    )
    shuffled = tie_aware_log_partition(transform, beta, prompt[order], np.exp(rewards[order]))
    np.testing.assert_allclose(shuffled, weak, rtol=1e-12, atol=1e-14)
    slack = 1e-12 * (1 + np.abs(weak))
    assert (weak >= randomized - slack).all()  # f is non-decreasing
    assert (randomized >= strict - slack).all()
    assert (weak >= mid - slack).all()
    assert (mid >= strict - slack).all()


def test_an_atom_of_one_prompt_is_an_atom_where_it_occurs_once():
    prompt, rewards = [0, 0, 0, 1, 1, 1], [0.5, 0.5, 0.7, 0.5, 0.6, 0.7]
    found = tie_aware_log_partition(IDENTITY, 1.0, prompt, rewards)
    e = np.exp
    np.testing.assert_allclose(
        np.exp(found), [2 / 3 * e(2 / 3) + e(1) - e(2 / 3), e(1 / 3) / 3 + e(1) - e(1 / 3)], rtol=1e-14
    )


def test_each_sample_has_the_log_partition_of_its_prompt_and_beta_in_chunks_too(monkeypatch):
    rng = np.random.default_rng(3)
    prompt, rewards = np.repeat(np.arange(8), 6), rng.integers(0, 9, 48).astype(float)
    lengths = rng.integers(1, 40, 48)
    whole = reference_targets(prompt, rewards, transform=IDENTITY, beta=2.0, lengths=lengths)
    for row in range(48):
        log_z = tie_aware_log_partition(IDENTITY, 2.0 / lengths[row], prompt, rewards)[prompt[row]]
        assert whole.log_partition[row] == pytest.approx(log_z, rel=1e-13)
    monkeypatch.setattr(log_partition, "CHUNK", 5)
    parts = reference_targets(prompt, rewards, transform=IDENTITY, beta=2.0, lengths=lengths)
    np.testing.assert_array_equal(parts.target, whole.target)


COUNTS = RankCounts(*(np.array([1]) for _ in range(2)), np.array([3]))
GIVEN = {"transform": IDENTITY, "beta": 0.1, "normaliser": "tie_aware"}
HELD = {"reference_prompt": [0, 0, 0], "reference_rewards": [1.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrated_targets(COUNTS, **GIVEN), "tie_aware normaliser needs prompt"),
        (lambda: calibrated_targets(COUNTS, **GIVEN, prompt=[0]), "needs reference_prompt"),
        (lambda: calibrated_targets(COUNTS, **GIVEN, **HELD, prompt=[5]), "without references.*codes 5"),
        (lambda: tie_aware_log_partition(IDENTITY, 0.0, [0], [1.0]), "beta must be"),
        (lambda: tie_aware_log_partition(IDENTITY, 1.0, [0], [1.0], tie_method="low"), "unknown tie method"),
        (lambda: tie_aware_log_partition(IDENTITY, 1.0, [0], [np.nan]), "nan"),
        (lambda: IDENTITY.log_mean(0.5, 0.5, 1.0), "low < high"),
        (lambda: IDENTITY.log_mean(0.5, 1.5, 1.0), r"in \[0, 1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ObjectiveError, match=message):
        call()
