"""What the mean of exp(target/beta) over reference completions is to be, under the normaliser in use.

It is not 1 in general: a regression averages the scatter of estimated quantiles out, but exp does not. With
R_q estimated among n references, E exp(f(R_q)/beta) is larger than Z, by Jensen's inequality
(docs/reference/method.md, section 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.objective.checks import FloatArray, IntArray, integers
from qrpo_core.objective.normalisers import Normaliser, log_partition_parts, references_of
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.objective.transforms import RewardTransform


@dataclass(frozen=True, eq=False)
class ExpectedWeights:
    """Moments of w = exp(target/beta) of a reference completion, as the normaliser implies them, [samples].

    log_first, log_second : log E w and log E w^2. n : the references that each sample is ranked among.
    in_pool : whether the samples are references of their prompt, drawn from its n + 1 without repetition.
    """

    log_first: FloatArray
    log_second: FloatArray
    n: IntArray
    in_pool: bool

    def variance(self, first: FloatArray, second: FloatArray, rows: IntArray, n: IntArray) -> FloatArray:
        """The variance of the mean of w over `rows` samples of one prompt; first, second : E w, E w^2.

        Two samples outside the references are correlated, as they are ranked among the same n: without ties
        the second falls into the gap of the first with probability 2/(n + 2), into each other gap with 1/(n +
        2). The mean over all references of a pool does not scatter at all.
        """
        if self.in_pool:
            return (second - first**2) / rows * (n + 1 - rows) / n
        both = ((n + 1) * first**2 + second) / (n + 2)
        return second / rows + (rows - 1) / rows * both - first**2


def expected_weights(
    targets: CalibratedTargets,
    n: ArrayLike,
    *,
    transform: RewardTransform,
    prompt: ArrayLike,
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    reference_seeds: NDArray[np.uint64] | None = None,
    in_pool: bool,
) -> ExpectedWeights:
    """The moments under the normaliser, tie method and betas of `targets`; their values are not looked at.

    Without ties n R_q is uniform on 0..n, for a held-out reference and for one of the pool that is left out
    of its own ranking. `population` and `finite` claim that there are no ties: they imply Z_n/Z and 1. If the
    samples are in the pool, what counts ties (`tie_aware`, `empirical`, the tie method `randomized`) implies
    the mean over the prompt's own references, which is the same without ties. Of held-out references it
    implies a value where no rewards of the prompt tie; elsewhere the truth is not known.

    Parameters
    ----------
    n : [samples] references that each sample is ranked among; the other arguments as `calibrated_targets`.
    in_pool : whether the samples are references themselves.

    Raises
    ------
    ObjectiveError : as `calibrated_targets`.
    """
    codes, ranked = integers(prompt, what="prompt codes"), integers(n, what="n")
    references = references_of(reference_prompt, reference_rewards, reference_seeds)

    def log_mean(normaliser: Normaliser, beta: FloatArray) -> FloatArray:
        top, rest = log_partition_parts(
            normaliser, transform, beta, targets.tie_method, ranked, codes, references
        )
        return np.asarray(top / beta + rest, dtype=np.float64)

    counts_ties = targets.normaliser in ("empirical", "tie_aware") or targets.tie_method == "randomized"
    model: Normaliser = "empirical" if in_pool and counts_ties else "finite"
    log_z = log_mean(targets.normaliser, targets.beta)
    return ExpectedWeights(
        log_first=log_mean(model, targets.beta) - log_z,
        log_second=log_mean(model, 0.5 * targets.beta) - 2.0 * log_z,
        n=ranked,
        in_pool=in_pool,
    )
