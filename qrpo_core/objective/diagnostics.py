"""What a reward says about a data set before training: ties, atoms, saturation, calibration, length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import finite_rewards, integers, same_length
from qrpo_core.objective.quantiles import RankCounts, exchangeable_quantile
from qrpo_core.objective.references import group_by_prompt, sort_references


@dataclass(frozen=True)
class RewardDiagnostics:
    """The references of a data set under their reward.

    tie_rate : share of references whose reward another reference of the prompt has, too.
    largest_atom : mean over prompts of the share of their references with the commonest reward.
    signal_free_prompts : prompts on which all reference rewards are equal; signal_free_share of all prompts.
    ceiling : mean over prompts of the share of references tied at the prompt's best reward (0 if the best is
        alone): what the reward cannot tell apart at the top, where QRPO's targets are positive.
    length_correlation : of reward with log length within prompts; nan without lengths.
    """

    prompts: int
    references: int
    tie_rate: float
    largest_atom: float
    signal_free_prompts: int
    signal_free_share: float
    ceiling: float
    length_correlation: float


def reward_diagnostics(
    reference_prompt: ArrayLike, reference_rewards: ArrayLike, lengths: ArrayLike | None = None
) -> RewardDiagnostics:
    """Diagnostics of a table of reference rewards; all arguments [references], lengths in tokens.

    Raises
    ------
    ObjectiveError : NaN or infinite rewards, unequal lengths, no rows.
    """
    held = sort_references(reference_prompt, reference_rewards)
    counts, offsets = held.groups.counts, held.groups.offsets
    starts = np.ones(len(held.rewards), dtype=bool)
    starts[1:] = held.rewards[1:] != held.rewards[:-1]
    starts[offsets[:-1]] = True
    first = np.flatnonzero(starts)
    run_length = np.diff(np.append(first, len(starts)))
    run_of_prompt = np.searchsorted(
        first, offsets[:-1]
    )  # a prompt's first run; its last is before the next's
    largest = np.maximum.reduceat(run_length, run_of_prompt)
    top = run_length[np.append(run_of_prompt[1:], len(first)) - 1]
    signal_free = largest == counts
    correlation = math.nan
    if lengths is not None:
        correlation = length_correlation(reference_prompt, reference_rewards, lengths)
    return RewardDiagnostics(
        prompts=len(counts),
        references=len(starts),
        tie_rate=float(held.tied().mean()),
        largest_atom=float((largest / counts).mean()),
        signal_free_prompts=int(signal_free.sum()),
        signal_free_share=float(signal_free.mean()),
        ceiling=float(np.where(top > 1, top / counts, 0.0).mean()),
        length_correlation=correlation,
    )


@dataclass(frozen=True)
class Saturation:
    """Shares of samples at the ends of their references' range.

    high : no reference is better (weak quantile 1). low : no reference is worse (strict quantile 0).
    Large shares: n is too small to order the samples there, or the reward has a ceiling or a floor.
    """

    high: float
    low: float


def saturation(counts: RankCounts) -> Saturation:
    """Share of the samples with quantile 1 (weak) and 0 (strict)."""
    if len(counts) == 0:
        raise ObjectiveError("no samples to diagnose")
    high = counts.below + counts.equal == counts.n
    return Saturation(high=float(high.mean()), low=float((counts.below == 0).mean()))


@dataclass(frozen=True)
class Calibration:
    """Kolmogorov-Smirnov distance of quantiles from the uniform distribution.

    statistic : sup |empirical - uniform distribution function|. p_value : asymptotic, independent samples.
    """

    statistic: float
    p_value: float
    samples: int


def calibration(counts: RankCounts, seeds: NDArray[np.uint64]) -> Calibration:
    """Whether held-out completions rank among the references as if drawn from the same policy.

    Held-out references must be uniform; completions of another policy (a data set's own) are not, and
    the statistic says by how much. Ranks are randomised over ties and grid (`exchangeable_quantile`).

    Not for leave-one-out ranks: a whole pool ranked within itself is uniform whatever it holds.

    Parameters
    ----------
    counts : [samples] of held-out completions against the references, best one or few for each prompt.
    seeds : [samples] uint64, from the samples' ids.

    Raises
    ------
    ObjectiveError : no samples, seeds that do not fit.
    """
    from scipy.special import kolmogorov

    size = len(counts)
    if size == 0:
        raise ObjectiveError("no samples to diagnose")
    q = np.sort(exchangeable_quantile(counts, seeds))
    grid = np.arange(size + 1) / size
    statistic = float(max((grid[1:] - q).max(), (q - grid[:-1]).max()))
    root = math.sqrt(size)
    # Stephens 1970: the limit law at (sqrt n + 0.12 + 0.11/sqrt n) D is good from n = 5 up.
    return Calibration(statistic, float(kolmogorov((root + 0.12 + 0.11 / root) * statistic)), size)


def length_correlation(prompt: ArrayLike, rewards: ArrayLike, lengths: ArrayLike) -> float:
    """Pearson correlation of reward with log length, both less their prompt's mean; nan if one is constant.

    Within prompts, because hard prompts have long answers and low rewards whatever the reward prefers.
    All arguments [completions]; lengths in tokens, >= 1.
    """
    codes = integers(prompt, what="prompt codes")
    values = finite_rewards(rewards)
    tokens = np.asarray(lengths, dtype=np.float64)
    same_length(prompt=codes, rewards=values, lengths=tokens)
    if not (np.isfinite(tokens) & (tokens >= 1)).all():
        raise ObjectiveError("lengths must be token counts >= 1")
    groups = group_by_prompt(codes)
    first, counts = groups.offsets[:-1], groups.counts
    deviations = []
    for column in (values, np.log(tokens)):
        held = groups.gather(column)
        centred = held - np.repeat(np.add.reduceat(held, first) / counts, counts)
        # What rounding leaves of a constant column is not a deviation.
        noise = 8 * np.finfo(np.float64).eps * np.abs(held).max(initial=0.0)
        deviations.append(np.where(np.abs(centred) > noise, centred, 0.0))
    scale = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale > 0 else math.nan
