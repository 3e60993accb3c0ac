"""From rank counts to calibrated targets, in float64 and in one place.

    target = f(R_q) - beta log Z        reward units; target/beta = the log-ratio log pi/pi_ref, in nats

The target of the QRPO paper's loss (arXiv 2507.08068; docs/reference/method.md, section 1), with the
normaliser log Z as an explicit choice that must fit the tie method (section 3). Scaling and caps: section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, integers, positive_beta, same_length
from qrpo_core.objective.normalisers import (
    TIE_TOLERANCE,
    Normaliser,
    check_minimum,
    choose_normaliser,
    log_partition_parts,
    references_of,
    required,
)
from qrpo_core.objective.quantiles import RankCounts, TieMethod, leave_one_out_counts, quantile
from qrpo_core.objective.transforms import RewardTransform


@dataclass(frozen=True, eq=False)
class CalibratedTargets:
    """Targets of a table of samples: float64 columns [samples], and the choices behind them.

    quantile : R_q in [0, 1]. transformed : f(R_q), reward units. beta : KL strength of each sample (reward
    units per nat; beta/length where lengths were given). log_partition : log Z in nats.
    target : f(R_q) - beta log Z, reward units.
    normaliser : population, tie_aware, finite or empirical. beta_max_bound : samples with beta cut to
    beta_max.
    """

    quantile: FloatArray
    transformed: FloatArray
    beta: FloatArray
    log_partition: FloatArray
    target: FloatArray
    tie_method: TieMethod
    normaliser: Normaliser
    beta_max_bound: int

    @property
    def log_ratio(self) -> FloatArray:
        """target/beta: the log pi/pi_ref (nats) at which the loss is zero."""
        return self.target / self.beta

    @property
    def positive_share(self) -> float:
        """Share of the samples whose probability the loss raises (target > 0)."""
        return float((self.target > 0).mean()) if len(self.target) else float("nan")

    def __len__(self) -> int:
        return len(self.target)


def calibrated_targets(
    counts: RankCounts,
    *,
    transform: RewardTransform,
    beta: ArrayLike,
    tie_method: TieMethod = "weak",
    normaliser: Normaliser | Literal["auto"] = "auto",
    prompt: ArrayLike | None = None,
    reference_prompt: ArrayLike | None = None,
    reference_rewards: ArrayLike | None = None,
    seeds: NDArray[np.uint64] | None = None,
    reference_seeds: NDArray[np.uint64] | None = None,
    lengths: ArrayLike | None = None,
    beta_max: float | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> CalibratedTargets:
    """Calibrated targets f(R_q) - beta log Z of the samples behind `counts`.

    Parameters
    ----------
    counts : rank counts of the samples.
    transform : f. With parameters that vary by prompt, `prompt` codes are indices into them.
    beta : KL strength, > 0; a number or [samples].
    tie_method : weak (the paper's), mid, strict or randomized; see `quantile`.
    normaliser : population (the paper's), tie_aware, finite, empirical or auto; see normalisers.py.
    prompt : [samples] integer codes; for `tie_aware`, `empirical` and transforms that vary by prompt.
    reference_prompt, reference_rewards : [references] of the whole data set; they decide what ties.
    seeds, reference_seeds : uint64 [samples], [references]; for `randomized`.
    lengths : [samples] completion tokens in the loss. With them beta is divided by length, also in log Z.
    beta_max : largest beta/length, if any; the result counts how often it binds.
    tie_tolerance : share of tied references above which a normaliser that ties break is refused; 1 never.

    Raises
    ------
    ObjectiveError : a tie method that does not fit the normaliser, too few references (prompts named), NaN
        rewards, beta <= 0, unequal lengths, missing arguments.
    """
    codes = None if prompt is None else integers(prompt, what="prompt codes")
    rows = same_length(counts=counts.n, prompt=codes)
    betas, bound = _betas(beta, lengths, beta_max, rows)
    references = references_of(reference_prompt, reference_rewards, reference_seeds)
    check_minimum(transform, counts.n, codes, "references")
    chosen = choose_normaliser(normaliser, tie_method, references, counts, tie_tolerance)
    here = transform
    if transform.varies_by_prompt:
        here = transform.at(required(codes, "prompt", "a transform that varies by prompt"))
    q = quantile(counts.below, counts.equal, counts.n, tie_method, seeds)
    transformed = here.apply(q, counts.n)
    top, rest = log_partition_parts(chosen, transform, betas, tie_method, counts.n, codes, references)
    return CalibratedTargets(
        quantile=q,
        transformed=transformed,
        beta=betas,
        log_partition=top / betas + rest,
        # In this order equal rewards give (f - f) - beta * 0: exactly 0, not rounding noise.
        target=(transformed - top) - betas * rest,
        tie_method=tie_method,
        normaliser=chosen,
        beta_max_bound=bound,
    )


def reference_targets(
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    *,
    transform: RewardTransform,
    beta: ArrayLike,
    tie_method: TieMethod = "weak",
    normaliser: Normaliser | Literal["auto"] = "auto",
    reference_seeds: NDArray[np.uint64] | None = None,
    lengths: ArrayLike | None = None,
    beta_max: float | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> CalibratedTargets:
    """The targets of the references themselves, each left out of its own ranking.

    The input of `normalization_check`. Arguments and errors as `calibrated_targets`; lengths [references].
    """
    return calibrated_targets(
        leave_one_out_counts(reference_prompt, reference_rewards),
        transform=transform,
        beta=beta,
        tie_method=tie_method,
        normaliser=normaliser,
        prompt=reference_prompt,
        reference_prompt=reference_prompt,
        reference_rewards=reference_rewards,
        seeds=reference_seeds,
        reference_seeds=reference_seeds,
        lengths=lengths,
        beta_max=beta_max,
        tie_tolerance=tie_tolerance,
    )


def _betas(
    beta: ArrayLike, lengths: ArrayLike | None, beta_max: float | None, rows: int
) -> tuple[FloatArray, int]:
    """The beta of each sample, and how many of them beta_max cuts (docs/reference/method.md, section 5)."""
    given = positive_beta(beta)
    if given.ndim and given.shape != (rows,):
        raise ObjectiveError(f"beta has shape {given.shape}, there are {rows} samples")
    betas = np.broadcast_to(given, (rows,)).copy()
    if lengths is None:
        if beta_max is not None:
            raise ObjectiveError(
                f"beta_max = {beta_max} bounds beta/length, and no lengths are given",
                remedy="give lengths, or drop beta_max",
            )
        return betas, 0
    tokens = np.asarray(lengths)
    if tokens.shape != (rows,) or (tokens < 1).any():
        raise ObjectiveError(f"lengths must be {rows} token counts >= 1, got shape {tokens.shape}")
    betas /= tokens
    if beta_max is None:
        return betas, 0
    limit = float(positive_beta(beta_max))
    bound = betas > limit
    return np.where(bound, limit, betas), int(bound.sum())
