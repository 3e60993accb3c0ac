"""How the optimum spends its KL divergence above a quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.allocation import objective_facts
from qrpo_core.objective.optimum import above, beta_for_share
from qrpo_core.objective.transforms import get_transform
from qrpo_core.objective.truncated_logit import TruncatedLogit

IDENTITY = get_transform("identity")


@given(st.floats(0.02, 10), st.floats(0, 0.99))
def test_identity_in_closed_form(beta: float, quantile: float) -> None:
    """w = exp(t/beta)/Z: above c it is a truncated exponential, whose mean and log Z are elementary."""
    found, width = above(IDENTITY, beta, quantile), 1 - quantile
    share = math.expm1(width / beta) / (math.exp(1 / beta) - 1) * math.exp(quantile / beta)
    assert found.share == pytest.approx(share, rel=1e-9)
    # KL to the uniform on a stretch of width L: E[s]/beta - log((beta/L) expm1(L/beta)).
    mean = width / -math.expm1(-width / beta) - beta
    inside = mean / beta - math.log(beta / width * math.expm1(width / beta))
    # The derivative is taken over a step of 1e-4 in log beta: an error of 1e-8/6 times a third derivative.
    assert found.spent == pytest.approx(share * inside, abs=1e-6 * (1 + width / beta))
    assert found.kl == pytest.approx(objective_facts(IDENTITY, beta).kl, abs=1e-6 * (1 + 1 / beta))


@pytest.mark.parametrize("name", ["identity", "square", "sqrt", "log"])
def test_limits(name: str) -> None:
    transform = get_transform(name)
    whole = above(transform, 0.05, 0.0)
    assert whole.share == 1
    assert whole.spent == pytest.approx(whole.kl, abs=1e-12)
    spent = [above(transform, 0.05, quantile).spent for quantile in np.linspace(0, 0.99, 12)]
    assert spent == sorted(spent, reverse=True)
    assert above(transform, 1e-3, 0.9).share == pytest.approx(1, abs=1e-6)


def test_tup_is_zero_below_lambda_and_elementary_at_beta_1() -> None:
    """w = (l/(1 - l))/Z with l = u - 1/2: an integral of l/(1 - l) is -l - log(1 - l)."""

    def integral(label: float) -> float:
        return -label - math.log1p(-label)

    transform = TruncatedLogit(0.5)
    share = 1 - integral(0.2) / integral(0.5)
    assert above(transform, 1.0, 0.7).share == pytest.approx(share, rel=1e-9)
    below = above(transform, 1.0, 0.3)
    assert below.share == pytest.approx(1, abs=1e-12)
    assert below.kl - below.spent == pytest.approx(-math.log(0.7), abs=1e-6)  # being above 0.3 at all


def test_the_beta_of_a_share() -> None:
    beta = beta_for_share(IDENTITY, 0.7)
    assert beta is not None
    found = above(IDENTITY, beta, 0.7)
    assert found.spent / found.kl == pytest.approx(0.5, abs=1e-6)
    assert beta_for_share(IDENTITY, 0.0) is None
    smaller = beta_for_share(IDENTITY, 0.9)
    assert smaller is not None
    assert smaller < beta


def test_refusals() -> None:
    for quantile in (1.0, -0.1, math.nan):
        with pytest.raises(ObjectiveError, match="nothing above it"):
            above(IDENTITY, 0.1, quantile)
    with pytest.raises(ObjectiveError, match="beta"):
        above(IDENTITY, 0.0, 0.5)
    with pytest.raises(ObjectiveError, match="no bound"):
        above(get_transform("normal"), 0.1, 0.5)
