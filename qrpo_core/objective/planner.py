"""What the quantile estimates are worth, and where further references would be worth most.

With k = below + equal hits in n references and a uniform prior, R_q given the data is Beta(1 + k, 1 + n - k)
(method.md section 4). Everything here follows from that posterior; the uncertainty of log Z is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, IntArray, integers, positive_beta, same_length
from qrpo_core.objective.diagnostics import (
    Calibration,
    RewardDiagnostics,
    Saturation,
    calibration,
    length_correlation,
    reward_diagnostics,
    saturation,
)
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.transform_base import RewardTransform

__all__ = [
    "Allocation",
    "Calibration",
    "ObjectiveFacts",
    "RewardDiagnostics",
    "Saturation",
    "allocate_references",
    "calibration",
    "length_correlation",
    "marginal_gain",
    "objective_facts",
    "quantile_standard_error",
    "references_needed",
    "reward_diagnostics",
    "saturation",
    "target_standard_error",
    "threshold_quantile",
]


def threshold_quantile(transform: RewardTransform, beta: float) -> float:
    """The quantile q* at which the target changes sign, f(q*) = beta log Z.

    It is the share of references pushed down. For identity it is beta log Z: 0.77 at beta = 0.1, 0.993 at
    1e-3 (method.md section 4).
    """
    _check_shared(transform)
    level = float(positive_beta(beta)) * float(transform.log_partition(beta))
    low, high = 0.0, 1.0
    while True:  # bisection to the last bit: f may have steps
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return high
        if float(transform.apply(middle)) < level:
            low = middle
        else:
            high = middle


def references_needed(transform: RewardTransform, beta: float) -> float:
    """References per prompt that resolve the threshold: n* = 1/(1 - q*), one of them expected above it.

    For identity 1/(beta log(1/beta)) up to exp(-1/beta): 411 at 3e-4, 57 at 3e-3, 22 at 0.01, 4.3 at 0.1
    (method.md section 4). inf where q* rounds to 1 (the normal transform at small beta).
    """
    above = 1.0 - threshold_quantile(transform, beta)
    return 1.0 / above if above > 0.0 else math.inf


@dataclass(frozen=True)
class ObjectiveFacts:
    """What a transform and beta ask for, before any data (method.md section 4).

    pushed_down : q*, the share of reference samples whose probability falls.
    largest_log_ratio, smallest_log_ratio : targets in nats at q = 1 and q = 0.
    kl : KL(pi* || pi_ref) of the optimum, nats. references_needed : n*.
    """

    pushed_down: float
    largest_log_ratio: float
    smallest_log_ratio: float
    kl: float
    references_needed: float


def objective_facts(transform: RewardTransform, beta: float) -> ObjectiveFacts:
    """The numbers worth printing about (transform, beta); population normaliser."""
    _check_shared(transform)
    log_z = float(transform.log_partition(beta))
    low, high = transform.bounds
    # KL(pi*||pi_ref) = u dlogZ/du - log Z with u = 1/beta, the derivative taken in log u.
    step = 1e-4
    slope = (
        float(transform.log_partition(beta * math.exp(-step)))
        - float(transform.log_partition(beta * math.exp(step)))
    ) / (2 * step)
    return ObjectiveFacts(
        pushed_down=threshold_quantile(transform, beta),
        largest_log_ratio=high / beta - log_z,
        smallest_log_ratio=low / beta - log_z,
        kl=slope - log_z,
        references_needed=references_needed(transform, beta),
    )


def quantile_standard_error(below: ArrayLike, equal: ArrayLike, n: ArrayLike) -> FloatArray:
    """sqrt(q(1-q)/n) of the weak quantile (method.md section 4), [samples].

    It is 0 at q = 0 and q = 1, where the data say least; `quantile_interval` and `target_standard_error` do
    not share that fault.
    """
    counts = RankCounts(*(np.atleast_1d(np.asarray(column)) for column in (below, equal, n)))
    q = (counts.below + counts.equal) / counts.n
    return np.sqrt(q * (1.0 - q) / counts.n)


def target_standard_error(counts: RankCounts, *, transform: RewardTransform, beta: float) -> FloatArray:
    """Posterior standard deviation of the target f(R_q)/beta, in nats, [samples]."""
    variance, _ = _posterior(counts, transform, beta)
    return np.sqrt(variance) / beta


def marginal_gain(
    counts: RankCounts, additional: ArrayLike, *, transform: RewardTransform, beta: float
) -> FloatArray:
    """Expected fall of each target's weighted variance after `additional` further references, [samples].

    Var f(R_q) falls to s/(s + k) of itself in expectation after k more draws, s = n + 2 (exact for a Beta
    posterior and f = identity, to first order for others). The weight 4 P(1 - P), P = P(R_q > q* | data),
    is 1 on the threshold and 0 where the sign of the target is settled. Units: reward squared.
    """
    variance, near = _posterior(counts, transform, beta)
    more = np.asarray(additional, dtype=np.float64)
    if (more < 0).any():
        raise ObjectiveError(f"additional references must be >= 0, got {more.min()}")
    return variance * near * more / (counts.n + 2 + more)


@dataclass(frozen=True, eq=False)
class Allocation:
    """A further budget of references over prompts.

    prompt [prompts] codes, ascending; additional [prompts] references to draw; the weighted variance of the
    targets (reward units squared, summed over samples) before and, in expectation, after.
    """

    prompt: IntArray
    additional: IntArray
    variance_before: float
    variance_after: float


def allocate_references(
    prompt: ArrayLike,
    counts: RankCounts,
    *,
    transform: RewardTransform,
    beta: float,
    budget: int,
    max_per_prompt: int | None = None,
) -> Allocation:
    """Share `budget` further references over the prompts, each to where `marginal_gain` is largest.

    Most where targets are uncertain and near the threshold; none where all rewards of a prompt, samples' and
    references', are equal. The sum of gains is concave, so giving one reference at a time to the best prompt
    is optimal; a price found by bisection does the same at once.

    Parameters
    ----------
    prompt : [samples] integer codes. counts : [samples].
    budget : references to give away, >= 0; less is given where no prompt gains or all are at max_per_prompt.
    max_per_prompt : most that one prompt gets.

    Raises
    ------
    ObjectiveError : unequal lengths, budget < 0, max_per_prompt < 0.
    """
    codes = integers(prompt, what="prompt codes")
    if same_length(prompt=codes, counts=counts.n) == 0:
        raise ObjectiveError("no samples to plan for")
    if budget < 0 or (max_per_prompt is not None and max_per_prompt < 0):
        raise ObjectiveError(f"budget {budget} and max_per_prompt {max_per_prompt} must be >= 0")
    groups = group_by_prompt(codes)
    variance, near = _posterior(counts, transform, beta)
    weighted = np.add.reduceat(groups.gather(variance * near), groups.offsets[:-1])
    equal = groups.gather((counts.equal == counts.n).astype(np.float64))
    signal_free = np.minimum.reduceat(equal, groups.offsets[:-1]) == 1.0
    weighted = np.where(signal_free, 0.0, weighted)
    size = np.maximum.reduceat(groups.gather((counts.n + 2).astype(np.float64)), groups.offsets[:-1])
    cap = float(budget if max_per_prompt is None else min(budget, max_per_prompt))
    given = _fill(weighted, size, budget, cap)
    return Allocation(
        prompt=groups.codes,
        additional=given,
        variance_before=float(weighted.sum()),
        variance_after=float((weighted * (size / (size + given))).sum()),
    )


def _fill(weighted: FloatArray, size: FloatArray, budget: int, cap: float) -> IntArray:
    """Integers k <= cap, sum <= budget, that minimise the sum of weighted * size/(size + k)."""

    def at(price: float) -> FloatArray:  # -d/dk of the sum is weighted size/(size + k)^2 = price
        return np.clip(np.floor(np.sqrt(weighted * size / price) - size), 0.0, cap)

    if budget == 0 or not (weighted > 0).any():
        return np.zeros(len(weighted), dtype=np.int64)
    high = float((weighted / size).max()) * 2.0  # nobody buys
    low = float((weighted * size / (size + cap + 1.0) ** 2)[weighted > 0].min()) / 2.0  # everybody is at cap
    for _ in range(200):
        price = math.sqrt(low * high)
        low, high = (price, high) if at(price).sum() > budget else (low, price)
    given = at(high)
    # What rounding down left over goes to the best next steps, one each round.
    while (left := int(budget - given.sum())) > 0:
        step = np.where(given < cap, weighted * size / ((size + given) * (size + given + 1.0)), 0.0)
        best = np.argsort(-step, kind="stable")[:left]
        best = best[step[best] > 0]
        if len(best) == 0:
            break
        given[best] += 1.0
    return given.astype(np.int64)


def _posterior(counts: RankCounts, transform: RewardTransform, beta: float) -> tuple[FloatArray, FloatArray]:
    """For each sample: the posterior variance of f(R_q), and 4 P(1 - P) with P = P(R_q > q*)."""
    from scipy.special import betainc, betaincc, betaincinv

    _check_shared(transform)
    hits = counts.below + counts.equal
    # (hits, n) takes few values: one posterior for each.
    base = int(counts.n.max(initial=0)) + 1
    keys, inverse = np.unique(counts.n * base + hits, return_inverse=True)
    alpha, other = (1.0 + keys % base)[:, None], (1.0 + keys // base - keys % base)[:, None]
    # E g(R_q) = integral over p of g(posterior quantile at p): Gauss-Legendre, 64 nodes.
    nodes, weights = np.polynomial.legendre.leggauss(64)
    q = np.asarray(betaincinv(alpha, other, 0.5 * (nodes + 1.0)), dtype=np.float64)
    values = transform.apply(np.clip(q, np.finfo(np.float64).tiny, 1.0 - 2.0**-53))
    mean = values @ (0.5 * weights)
    variance = (values - mean[:, None]) ** 2 @ (0.5 * weights)
    threshold = threshold_quantile(transform, beta)
    # Not 1 - below, which is 0 from 1e-16 on: that prompt would get nothing where all others are full.
    below, above = (np.asarray(tail(alpha[:, 0], other[:, 0], threshold)) for tail in (betainc, betaincc))
    near = 4.0 * below * above
    return variance[inverse], near[inverse]


def _check_shared(transform: RewardTransform) -> None:
    if transform.varies_by_prompt:
        raise ObjectiveError(
            f"transform {transform.name!r} differs by prompt; the planner takes one for all",
            remedy="plan with 'normal', or with numbers for mean and std",
        )
