"""What further references of every prompt are expected to change, before they are drawn.

With k = below + equal hits in n references and a uniform prior, R_q given the data is Beta(1 + k, 1 + n - k)
(docs/reference/method.md, section 4), and the hits of further references are beta-binomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.allocation import threshold_quantile
from qrpo_core.objective.checks import FloatArray, finite_rewards
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.transforms import RewardTransform


@dataclass(frozen=True)
class Signs:
    """How often targets have the sign of their true value, in expectation over the posterior.

    right : share of all targets. right_above : share of the positive ones whose true value is positive too;
    nan where none is positive. above : share of positive targets.
    """

    right: float
    right_above: float
    above: float


def expected_signs(
    counts: RankCounts, *, transform: RewardTransform, beta: float, additional: int = 0
) -> Signs:
    """The signs of targets with `additional` further references of each prompt; 0: as they are.

    A target is positive if its estimated quantile (weak: hits/n) is above the threshold q*, its true value if
    R_q is.

    counts : [samples] among their references. Raises ObjectiveError for a negative number or no samples.
    """
    from scipy.special import betaincc
    from scipy.stats import betabinom

    if additional < 0 or len(counts) == 0:
        raise ObjectiveError(
            f"{len(counts)} samples and {additional} further references: need 1 and 0 or more"
        )
    threshold = threshold_quantile(transform, beta)
    pairs = np.stack([counts.below + counts.equal, counts.n], axis=1)
    distinct, times = np.unique(pairs, axis=0, return_counts=True)
    hits, n = distinct[:, :1], distinct[:, 1:]
    drawn = np.arange(additional + 1)  # hits among the further references
    weight = betabinom.pmf(drawn, additional, 1 + hits, 1 + n - hits) * times[:, None]
    true = np.asarray(betaincc(1 + hits + drawn, 1 + n - hits + additional - drawn, threshold))
    positive = (hits + drawn) / (n + additional) > threshold
    total, above = weight.sum(), (weight * positive).sum()
    right = (weight * np.where(positive, true, 1.0 - true)).sum()
    right_above = (weight * positive * true).sum() / above if above > 0 else np.nan
    return Signs(float(right / total), float(right_above), float(above / total))


def chance_of_signal(prompt: ArrayLike, rewards: ArrayLike, additional: int) -> FloatArray:
    """For every prompt on which all rewards are equal: the chance that a further one differs, [such prompts].

    A prompt's share of completions with a reward v is Beta(a, b) over the prompts, fitted to all of them by
    maximum likelihood, for each v on which a prompt is stuck. So a data set where most prompts mix 0 and 1
    promises more than one where nearly all are stuck.

    prompt, rewards : [references]. additional : further references of each prompt, >= 0.
    """
    values = finite_rewards(rewards)
    if additional < 0:
        raise ObjectiveError(f"{additional} further references", remedy="0 or more")
    groups = group_by_prompt(prompt)
    grouped = groups.gather(values)
    first, sizes = groups.offsets[:-1], groups.counts
    stuck = np.minimum.reduceat(grouped, first) == np.maximum.reduceat(grouped, first)
    found = np.empty(len(sizes))
    fitted: dict[bytes, tuple[float, float]] = {}
    for value in np.unique(grouped[first][stuck]):
        equal = np.add.reduceat((grouped == value).astype(np.int64), first)
        table, times = np.unique(np.stack([equal, sizes], axis=1), axis=0, return_counts=True)
        key = np.column_stack([table, times]).tobytes()
        if key not in fitted:
            fitted[key] = _fit(table[:, 0], table[:, 1], times)
        here = stuck & (grouped[first] == value)
        found[here] = -np.expm1(_log_all_equal(*fitted[key], sizes[here], additional))
    return np.asarray(found[stuck], dtype=np.float64)


def _log_all_equal(a: float, b: float, n: ArrayLike, more: int) -> FloatArray:
    """log P(the next `more` are all hits | n of n were), for a Beta(a, b) prior."""
    from scipy.special import betaln

    hits = np.asarray(n, dtype=np.float64)
    return np.asarray(betaln(a + hits + more, b) - betaln(a + hits, b), dtype=np.float64)


def _fit(hits: ArrayLike, n: ArrayLike, times: ArrayLike) -> tuple[float, float]:
    """a and b of the beta-binomial with the largest likelihood, each from 0.01 to 1000."""
    from scipy.optimize import minimize
    from scipy.stats import betabinom

    def loss(logs: FloatArray) -> float:
        return -float(np.dot(times, betabinom.logpmf(hits, n, *np.exp(logs))))

    limit = np.log([[0.01, 1000.0]] * 2)
    found = minimize(loss, np.zeros(2), method="Nelder-Mead", bounds=limit, options={"xatol": 1e-4})
    a, b = np.exp(found.x).tolist()
    return a, b
