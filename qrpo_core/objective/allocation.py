"""The uncertainty of quantile estimates, and the prompts where further references reduce it most.

With k = below + equal hits in n references and a uniform prior, R_q given the data is Beta(1 + k, 1 + n - k)
(docs/reference/method.md, section 4). Everything here follows from that posterior; the uncertainty of log Z
is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, IntArray, integers, positive_beta, same_length
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.transforms import RewardTransform

_MOST_REFERENCES = 10_000_000


def threshold_quantile(transform: RewardTransform, beta: float) -> float:
    """The quantile q* at which the target changes sign, f(q*) = beta log Z.

    It is the share of references pushed down. For identity it is beta log Z: 0.77 at beta = 0.1, 0.993 at
    1e-3 (docs/reference/method.md, section 4).
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


SURE = 0.9
"""The probability with which `references_needed` wants a sign to be right, unless told otherwise."""


def references_needed(
    transform: RewardTransform, beta: float, *, probability: float = SURE, quantile: float | None = None
) -> float:
    """The n from which on a target has the right sign with at least this probability.

    A completion at the true quantile q is above K of n references without ties, K ~ Binomial(n, q), and its
    target is positive if K/n > q*, the threshold. So the sign is right with probability P(K > n q*) for q >
    q*, and P(K <= n q*) for q < q*. This is no monotone function of n: the result is the least n such that n
    and all larger numbers reach the probability (docs/reference/method.md, section 4).

    Parameters
    ----------
    quantile : q; None takes the middle of q* and 1, where the completions are that QRPO pushes up.

    Returns
    -------
    The number of references that the completion is compared with, one fewer than its prompt has if it is a
    reference itself. inf where q is q* (also by rounding), and above ten million.

    Raises
    ------
    ObjectiveError : probability or quantile outside (0, 1).
    """
    threshold = threshold_quantile(transform, beta)
    q = 0.5 * (1.0 + threshold) if quantile is None else quantile
    for name, value in (("probability", probability), ("quantile", 0.5 if quantile is None else quantile)):
        if not 0.0 < value < 1.0:
            raise ObjectiveError(f"{name} must lie between 0 and 1, got {value}")
    if q in (threshold, 1.0):
        return math.inf
    if threshold == 0.0:  # every target is positive
        return 1.0
    # Chernoff: P(wrong) <= exp(-n KL(q* || q)), so no n above this one can fall short.
    divergence = threshold * math.log(threshold / q)
    divergence += (1.0 - threshold) * (math.log1p(-threshold) - math.log1p(-q))
    most = -math.log1p(-probability) / divergence if divergence > 0.0 else math.inf
    if most > _MOST_REFERENCES:
        return math.inf
    n = np.arange(1, math.ceil(most) + 1)
    short = np.flatnonzero(sign_right(n, threshold, q) < probability)
    return float(n[short[-1]] + 1) if len(short) else 1.0


def sign_right(n: IntArray, threshold: float, quantile: float) -> FloatArray:
    """P(K/n > q*), K ~ Binomial(n, q), or P(K/n <= q*) for q < q*, in the shape of n."""
    from scipy.special import betainc, betaincc

    most = np.floor(n * threshold)  # hits with which the target is not positive
    tail = betainc if quantile > threshold else betaincc
    return np.asarray(tail(most + 1.0, n - most, quantile), dtype=np.float64)


@dataclass(frozen=True)
class ObjectiveFacts:
    """Numbers that follow from a transform and beta alone, before any data.

    Source: docs/reference/method.md, section 4.

    pushed_down : q*, the share of reference samples whose probability falls.
    largest_log_ratio, smallest_log_ratio : targets in nats at q = 1 and q = 0.
    kl : KL(pi* || pi_ref) of the optimum, nats. references_needed : its defaults, q = (1 + q*)/2.
    """

    pushed_down: float
    largest_log_ratio: float
    smallest_log_ratio: float
    kl: float
    references_needed: float


def objective_facts(transform: RewardTransform, beta: float) -> ObjectiveFacts:
    """The facts of (transform, beta) under the population normaliser."""
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
    """sqrt(q(1-q)/n) of the weak quantile (docs/reference/method.md, section 4), [samples].

    It is 0 at q = 0 and q = 1, where the data say least; `quantile_interval` and `target_standard_error` are
    not.
    """
    counts = RankCounts(*(np.atleast_1d(np.asarray(column)) for column in (below, equal, n)))
    q = (counts.below + counts.equal) / counts.n
    return np.sqrt(q * (1.0 - q) / counts.n)


def target_standard_error(counts: RankCounts, *, transform: RewardTransform, beta: float) -> FloatArray:
    """Posterior standard deviation of the target f(R_q)/beta, nats (TUP: of label/beta), [samples]."""
    variance, _ = _posterior(counts, transform, beta)
    return np.sqrt(variance) / beta


def marginal_gain(
    counts: RankCounts, additional: ArrayLike, *, transform: RewardTransform, beta: float
) -> FloatArray:
    """Expected decrease of each target's weighted variance after `additional` references, [samples].

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
    """Divide `budget` further references among the prompts, each where `marginal_gain` is largest.

    Prompts with uncertain targets near the threshold get most; prompts on which all rewards are equal get
    none. The sum of gains is concave, so one reference at a time to the best prompt is optimal; a price found
    by bisection gives the same.

    Parameters
    ----------
    prompt : [samples] integer codes. counts : [samples].
    budget : references to give, >= 0; fewer are given where no prompt gains or all are at max_per_prompt.
    max_per_prompt : the limit of each prompt.

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
    """Integers k <= cap with sum <= budget that minimise the sum of weighted * size/(size + k)."""

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
    # The remainder of rounding down goes to the best next steps, one each round.
    while (left := int(budget - given.sum())) > 0:
        step = np.where(given < cap, weighted * size / ((size + given) * (size + given + 1.0)), 0.0)
        best = np.argsort(-step, kind="stable")[:left]
        best = best[step[best] > 0]
        if len(best) == 0:
            break
        given[best] += 1.0
    return given.astype(np.int64)


def _posterior(counts: RankCounts, transform: RewardTransform, beta: float) -> tuple[FloatArray, FloatArray]:
    """(posterior variance of what is fitted, f(R_q), 4 P(1 - P) with P = P(R_q > q*)), [samples] each."""
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
    values = transform.fitted(np.clip(q, np.finfo(np.float64).tiny, 1.0 - 2.0**-53))
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
