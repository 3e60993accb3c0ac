"""Transforms: population goldens, closed form against quadrature, laws, refusals."""

from __future__ import annotations

import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.quadrature import quadrature_log_partition
from qrpo_core.objective.transforms import TRANSFORM_NAMES, get_transform

BETAS = np.geomspace(1e-5, 1e3, 41)
BOUNDED = [
    ("identity", {}),
    ("square", {}),
    ("sqrt", {}),
    ("power", {"exponent": 1 / 3}),
    ("power", {"exponent": 3.0}),
    ("power", {"exponent": 0.02}),  # 1F1(50; 51; u)
    ("power", {"exponent": 40.0}),
]


def test_population_log_partition_equals_the_golden_values(golden):
    for row in golden["population_log_partition"]:
        params = {"exponent": float(row["exponent"])} if "exponent" in row else {}
        transform, beta = get_transform(row["transform"], **params), float(row["beta"])
        log_z = float(transform.log_partition(beta))
        assert log_z == pytest.approx(float(row["log_z"]), rel=1e-12, abs=0), row
        assert beta * log_z == pytest.approx(float(row["beta_log_z"]), rel=1e-12, abs=0), row


@pytest.mark.parametrize(("name", "params"), BOUNDED)
def test_closed_forms_equal_fifty_digit_values_from_beta_1e_minus_5_to_1e3(name, params):
    exponent = {"identity": 1.0, "square": 2.0, "sqrt": 0.5}.get(name) or params["exponent"]
    values = get_transform(name, **params).log_partition(BETAS)
    with mpmath.workdps(50):
        a = 1 / mpmath.mpf(exponent)
        exact = [mpmath.log(mpmath.hyp1f1(a, a + 1, 1 / mpmath.mpf(float(beta)))) for beta in BETAS]
        errors = [abs(mpmath.mpf(float(v)) / e - 1) for v, e in zip(values, exact, strict=True)]
    assert max(errors) < 1e-12


@pytest.mark.parametrize(("name", "params"), [*BOUNDED, ("log", {})])
def test_closed_form_equals_quadrature(name, params):
    transform = get_transform(name, **params)
    by_quadrature = quadrature_log_partition(transform.apply, BETAS[::4])
    np.testing.assert_allclose(by_quadrature, transform.log_partition(BETAS[::4]), rtol=1e-12, atol=1e-13)


def test_normal_closed_form_equals_quadrature_where_it_converges():
    beta = np.array([0.5, 1.0, 5.0])
    clipped = get_transform("normal")
    by_quadrature = quadrature_log_partition(lambda t: clipped.apply(np.clip(t, 1e-300, 1 - 2**-53)), beta)
    np.testing.assert_allclose(by_quadrature, clipped.log_partition(beta), rtol=1e-6)


def test_step_transform_has_the_partition_of_its_two_atoms():
    step = get_transform("custom", f=lambda t: np.where(t >= 0.3, 1.0, 0.0))
    beta = np.array([1e-5, 1e-3, 0.1, 1.0, 1e3])
    np.testing.assert_allclose(
        step.log_partition(beta), 1 / beta + np.log(0.7 + 0.3 * np.exp(-1 / beta)), rtol=1e-12
    )


def test_quadrature_finds_a_step_too_close_to_one_for_its_first_nodes():
    edge = 1.0 - 2.0**-30
    beta = 0.03
    value = quadrature_log_partition(lambda t: np.where(t >= edge, 1.0, 0.0), beta)
    assert float(value) == pytest.approx(
        float(np.logaddexp(1 / beta + np.log1p(-edge), np.log(edge))), rel=1e-8
    )


def test_the_published_identity_formula_is_off_by_what_method_2a_says():
    # log beta + 1/beta instead of log(beta (exp(1/beta) - 1)), in units of reward
    for beta, off in [(0.1, 4.5e-6), (0.2, 1.4e-3), (0.5, 0.073), (1.0, 0.46)]:
        log_z = float(get_transform("identity").log_partition(beta))
        assert beta * (np.log(beta) + 1 / beta - log_z) == pytest.approx(off, rel=0.05)


@given(st.floats(1e-5, 1e3), st.floats(1.01, 3.0), st.sampled_from(BOUNDED[:5]))
def test_beta_log_partition_falls_with_beta_from_the_largest_reward_to_the_mean(beta, factor, which):
    transform = get_transform(which[0], **which[1])
    low, high = (
        beta * float(transform.log_partition(beta)),
        factor * beta * float(transform.log_partition(factor * beta)),
    )
    assert 0.0 < high <= low * (1 + 1e-12) <= 1.0 + 1e-12  # f(1) = 1 as beta -> 0


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=30),
    st.sampled_from([*BOUNDED, ("log", {}), ("normal", {}), ("scaled_normal", {"mean": 0.3, "std": 2.0})]),
    st.integers(3, 60),
)
def test_every_transform_is_non_decreasing_and_within_its_bounds(quantiles, which, n):
    transform = get_transform(which[0], **which[1])
    q = np.sort(quantiles)
    for values in (transform.apply(q), transform.apply(q, n)):
        assert (np.diff(values[np.isfinite(values)]) >= 0).all()
        assert (values >= transform.bounds[0]).all()
        assert (values <= transform.bounds[1]).all()


def test_scalar_and_array_arguments_keep_their_shape():
    for name, params in [*BOUNDED, ("log", {}), ("normal", {}), ("custom", {"f": np.sqrt})]:
        transform = get_transform(name, **params)
        assert np.shape(transform.apply(0.5)) == np.shape(transform.log_partition(0.1)) == ()
        grid = np.full((2, 3), 0.25)
        assert transform.apply(grid).shape == transform.log_partition(grid).shape == (2, 3)
        assert transform.log_partition(grid)[1, 2] == transform.log_partition(0.25)


def test_log_and_normal_are_clamped_to_what_n_references_can_tell():
    log, normal = get_transform("log"), get_transform("normal")
    np.testing.assert_allclose(log.apply([0.0, 0.5, 1.0], 4), np.log([0.25, 0.5, 1.0]))
    assert log.apply([0.0])[0] == -np.inf
    quartile = 0.67448975019608174  # Phi^-1(3/4)
    np.testing.assert_allclose(normal.apply([0.0, 0.5, 1.0], 4), [-quartile, 0.0, quartile], rtol=1e-14)


@pytest.mark.parametrize(("name", "n"), [("log", 1), ("normal", 1), ("normal", 2)])
def test_transforms_without_signal_at_this_n_are_refused_by_name(name, n):
    transform = get_transform(name)
    with pytest.raises(ObjectiveError, match=f"{name}.*at least {n + 1 if name == 'log' else 3}.*n = {n}"):
        transform.apply([0.5], n)
    assert np.isfinite(transform.apply([0.0, 1.0], transform.min_references)).all()


def test_scaled_normal_with_parameters_by_prompt_equals_one_transform_for_each_prompt():
    mean, std = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 0.0])
    transform = get_transform("scaled_normal", mean=mean, std=std)
    prompt, q, beta = np.array([2, 0, 1, 1]), np.array([0.0, 0.1, 0.9, 0.5]), np.array([0.1, 1.0, 2.0, 0.5])
    here = transform.at(prompt)
    for row, p in enumerate(prompt):
        alone = get_transform("scaled_normal", mean=float(mean[p]), std=float(std[p]))
        assert here.apply(q, 5)[row] == alone.apply(q[row], 5)
        assert here.log_partition(beta)[row] == alone.log_partition(beta[row])
    assert transform.at(np.array([2])).apply([0.0])[0] == -2.0  # std 0: the constant mean, no 0 * inf
    with pytest.raises(ObjectiveError, match="3 prompts"):
        transform.at(np.array([3]))


def test_a_transform_is_a_value():
    assert get_transform("power", exponent=2.0) == get_transform("power", exponent=2.0)
    assert get_transform("power", exponent=2.0) != get_transform("power", exponent=3.0)
    assert get_transform("identity") != get_transform("square")
    assert len({get_transform("log"), get_transform("log")}) == 1
    assert dict(get_transform("power", exponent=2.0).params) == {"exponent": 2.0}
    for name in set(TRANSFORM_NAMES) - {"custom", "power", "scaled_normal"}:
        assert pickle.loads(pickle.dumps(get_transform(name))) == get_transform(name)
    with pytest.raises(AttributeError):
        get_transform("power", exponent=2.0).exponent = 3.0


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("cube", {}, "unknown transform 'cube'.*identity"),
        ("power", {}, "takes exponent, got none"),
        ("identity", {"exponent": 2}, "takes no parameters, got exponent"),
        ("power", {"exponent": 0.0}, "exponent > 0"),
        ("power", {"exponent": np.inf}, "exponent > 0"),
        ("scaled_normal", {"mean": 0.0, "std": -1.0}, "standard deviations >= 0"),
        ("custom", {"f": lambda t: -t}, "decreases before t"),
        ("custom", {"f": np.log}, "finite number"),
        ("custom", {"f": lambda t: float(t)}, "vectorize"),
    ],
)
def test_transforms_that_cannot_be_meant_are_refused(name, params, message):
    with np.errstate(divide="ignore"), pytest.raises(ObjectiveError, match=message):
        get_transform(name, **params)


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_beta_that_is_not_positive_and_finite_is_refused(beta):
    for name in ("identity", "log", "normal"):
        with pytest.raises(ObjectiveError, match="beta must be finite and > 0"):
            get_transform(name).log_partition([0.1, beta])


@pytest.mark.parametrize("q", [-0.01, 1.01, np.nan])
def test_a_quantile_outside_zero_to_one_is_refused(q):
    with pytest.raises(ObjectiveError, match=r"\[0, 1\]"):
        get_transform("identity").apply([0.5, q])
