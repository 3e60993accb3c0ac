"""How the optimum of an objective spends its KL divergence over the quantiles of the reward.

The optimum's density on the quantile is w(t) = exp(f(t)/beta)/Z (docs/reference/method.md, sections 1 and 2).
Its KL divergence splits at a quantile c: one part goes to the choice between above and below c and to
differences below it, the other to differences above c, worth nothing where the reward is not believed there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import positive_beta
from qrpo_core.objective.transforms import RewardTransform

#: The range of beta in which `beta_for_share` looks.
_BETAS = (1e-4, 10.0)


@dataclass(frozen=True)
class Above:
    """The optimum above a quantile c.

    share : its probability of a completion above c. spent : nats of its KL divergence that go to differences
    among completions above c, share * KL(w above c || uniform above c). kl : the whole divergence, nats.
    """

    share: float
    spent: float
    kl: float


def above(transform: RewardTransform, beta: float, quantile: float) -> Above:
    """What the optimum has above a quantile in [0, 1), for a bounded transform.

    Raises ObjectiveError outside that range, for beta <= 0, and for the normal transforms.
    """
    if not math.isfinite(transform.bounds[1]):
        raise ObjectiveError(
            f"transform {transform.name!r} has no bound at quantile 1", remedy="take a bounded transform"
        )
    if not 0 <= quantile < 1:
        raise ObjectiveError(
            f"a quantile of {quantile} has nothing above it", remedy="0 or more, and below 1"
        )
    beta = float(positive_beta(beta))
    whole, kl = _log_mean(transform, beta, 0.0)
    part, inside = _log_mean(transform, beta, quantile)
    share = min(1.0, math.exp(part + math.log1p(-quantile) - whole))
    return Above(share, share * inside, kl)


def beta_for_share(transform: RewardTransform, quantile: float, spent: float = 0.5) -> float | None:
    """The beta at which a share of the optimum's KL divergence goes to differences above a quantile.

    spent : that share. A smaller beta spends a larger one. None where every beta from 1e-4 to 10
    spends more, or less.
    """
    low, high = map(math.log, _BETAS)

    def excess(log_beta: float) -> float:
        found = above(transform, math.exp(log_beta), quantile)
        return found.spent / found.kl - spent

    if excess(low) < 0 or excess(high) > 0:
        return None
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return math.exp(high)


def _log_mean(transform: RewardTransform, beta: float, quantile: float) -> tuple[float, float]:
    """(log of the mean of exp(f/beta) above a quantile, KL of the density there to the uniform one), nats."""
    # KL = u dlog(mean)/du - log(mean) with u = 1/beta, the derivative taken in log u.
    step = 1e-4
    betas = beta * np.exp([0.0, -step, step])
    value, smaller, larger = transform.log_mean(quantile, 1.0, betas).tolist()
    return value, max(0.0, (smaller - larger) / (2 * step) - value)
