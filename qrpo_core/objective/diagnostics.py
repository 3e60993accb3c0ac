"""Checks of a data set before training: ties, saturation, uniform ranks, length, normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, finite_rewards, integers, same_length
from qrpo_core.objective.expected_weights import ExpectedWeights
from qrpo_core.objective.log_partition import segment_sums
from qrpo_core.objective.quantiles import RankCounts, exchangeable_quantile
from qrpo_core.objective.references import Groups, group_by_prompt, sort_references
from qrpo_core.objective.targets import CalibratedTargets

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class RewardDiagnostics:
    """The references of a data set under their reward.

    tie_rate : share of references whose reward another reference of the prompt has too.
    largest_atom : mean over prompts of the share of their references with the commonest reward.
    signal_free_prompts : prompts on which all reference rewards are equal; signal_free_share of all prompts.
    ceiling : mean over prompts of the share of references tied at the prompt's best reward (0 if the best is
        alone). The reward cannot order these, and QRPO's positive targets are there.
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
    references = sort_references(reference_prompt, reference_rewards)
    counts, offsets = references.groups.counts, references.groups.offsets
    starts = np.ones(len(references.rewards), dtype=bool)
    starts[1:] = references.rewards[1:] != references.rewards[:-1]
    starts[offsets[:-1]] = True
    atoms = np.flatnonzero(starts)  # the first row of each run of equal rewards
    atom_sizes = np.diff(np.append(atoms, len(starts)))
    first_atom = np.searchsorted(atoms, offsets[:-1])  # of each prompt
    largest = np.maximum.reduceat(atom_sizes, first_atom)
    best = atom_sizes[np.append(first_atom[1:], len(atoms)) - 1]
    signal_free = largest == counts
    correlation = math.nan
    if lengths is not None:
        correlation = length_correlation(reference_prompt, reference_rewards, lengths)
    return RewardDiagnostics(
        prompts=len(counts),
        references=len(starts),
        tie_rate=float(references.tied().mean()),
        largest_atom=float((largest / counts).mean()),
        signal_free_prompts=int(signal_free.sum()),
        signal_free_share=float(signal_free.mean()),
        ceiling=float(np.where(best > 1, best / counts, 0.0).mean()),
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
class Uniformity:
    """Kolmogorov-Smirnov test of quantiles against the uniform distribution.

    statistic : sup |empirical - uniform distribution function|. p_value : exact, for independent samples.
    """

    statistic: float
    p_value: float


def rank_uniformity(counts: RankCounts, seeds: NDArray[np.uint64]) -> Uniformity:
    """Test whether held-out completions rank among the references as draws from the same policy.

    Held-out references must be uniform. Completions of another policy (a data set's own) are not, and the
    statistic measures by how much. Ranks are randomised over ties and grid (`exchangeable_quantile`).

    Not for leave-one-out ranks: a whole pool ranked within itself is always uniform.

    Parameters
    ----------
    counts : [samples] of held-out completions against the references, best one or few for each prompt.
    seeds : [samples] uint64, from the ids of the samples.

    Raises
    ------
    ObjectiveError : no samples, seeds that do not fit.
    """
    from scipy.stats import kstest

    if len(counts) == 0:
        raise ObjectiveError("no samples to diagnose")
    test = kstest(exchangeable_quantile(counts, seeds), "uniform")
    return Uniformity(float(test.statistic), float(test.pvalue))


def length_correlation(prompt: ArrayLike, rewards: ArrayLike, lengths: ArrayLike) -> float:
    """Pearson correlation of reward with log length, both less their prompt's mean; nan if one is constant.

    Within prompts, because hard prompts have long answers and low rewards under any reward.
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
        grouped = groups.gather(column)
        centred = grouped - np.repeat(np.add.reduceat(grouped, first) / counts, counts)
        # What rounding leaves of a constant column is not a deviation.
        noise = 8 * np.finfo(np.float64).eps * np.abs(grouped).max(initial=0.0)
        deviations.append(np.where(np.abs(centred) > noise, centred, 0.0))
    scale = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale > 0 else math.nan


@dataclass(frozen=True)
class NormalizationCheck:
    """The mean of exp(target/beta) over reference completions, beside the value that it is to have.

    Source: docs/reference/method.md, section 3.5.

    mean : the mean over prompts of the prompt's mean of exp(target/beta); inf where it overflows.
    standard_error : of that mean, over prompts; nan with one prompt, inf where it overflows.
    log_mean : log of mean, finite where mean is not.
    expected : the value that the normaliser implies; expected_error : the standard error with which `mean`
        scatters about it if the normaliser fits, 0 where every reference is a sample. nan if not given.
    prompt_quantiles : (level, prompt mean) pairs at levels 0, 0.05, 0.25, 0.5, 0.75, 0.95 and 1.
    """

    mean: float
    standard_error: float
    log_mean: float
    expected: float
    expected_error: float
    prompts: int
    references: int
    prompt_quantiles: tuple[tuple[float, float], ...]


def normalization_check(
    targets: CalibratedTargets, prompt: ArrayLike, expected: ExpectedWeights | None = None
) -> NormalizationCheck:
    """Mean of exp(target/beta) over reference completions, and what it is to be.

    Give it the targets of references: `reference_targets`, or held-out references ranked against the others.
    Under `empirical` with its own references it is 1 by construction. With lengths (beta/|y|) it is a
    diagnostic rather than an identity, because each completion then has its own beta.

    Parameters
    ----------
    targets : [references].
    prompt : [references] integer codes; every prompt counts the same at any number of references.
    expected : `expected_weights` of the same rows; without it nothing is expected.

    Raises
    ------
    ObjectiveError : no rows, unequal lengths.
    """
    codes = integers(prompt, what="prompt codes")
    log_ratio = targets.log_ratio
    if same_length(targets=log_ratio, prompt=codes) == 0:
        raise ObjectiveError("no reference targets to check")
    groups = group_by_prompt(codes)
    log_means = _log_prompt_means(groups, log_ratio)
    mean, error, log_mean = _mean_and_error(log_means)
    implied = (math.nan, math.nan) if expected is None else _expected(groups, expected)
    with np.errstate(over="ignore"):
        return NormalizationCheck(
            mean=mean,
            standard_error=error,
            log_mean=log_mean,
            expected=implied[0],
            expected_error=implied[1],
            prompts=len(groups.codes),
            references=len(codes),
            prompt_quantiles=tuple(
                (level, float(np.exp(np.quantile(log_means, level, method="inverted_cdf"))))
                for level in LEVELS
            ),
        )


def _log_prompt_means(groups: Groups, log_values: FloatArray) -> FloatArray:
    """log of each prompt's mean of exp(log_values), [prompts]."""
    prompts = len(groups.codes)
    top, rest = segment_sums(groups.gather(log_values), groups.offsets, np.arange(prompts), np.ones(prompts))
    return np.asarray(top + rest, dtype=np.float64)


def _mean_and_error(log_means: FloatArray) -> tuple[float, float, float]:
    """(mean, its standard error, log mean) of exp(log_means) over prompts."""
    prompts, largest = len(log_means), float(log_means.max())
    relative = np.exp(log_means - largest)  # prompt means in units of the largest one: no overflow
    log_mean = largest + math.log(float(relative.mean()))
    error = float(relative.std(ddof=1)) / math.sqrt(prompts) if prompts > 1 else math.nan
    with np.errstate(over="ignore"):
        return (
            float(np.exp(log_mean)),
            float(np.exp(largest + np.log(error))) if error != 0 else 0.0,
            log_mean,
        )


def _expected(groups: Groups, expected: ExpectedWeights) -> tuple[float, float]:
    """(mean over prompts of the expected prompt means, the standard error of the observed one about it)."""
    log_first = _log_prompt_means(groups, expected.log_first)
    log_second = _log_prompt_means(groups, expected.log_second)
    largest = float(log_first.max())
    first, second = np.exp(log_first - largest), np.exp(log_second - 2.0 * largest)
    n = np.maximum.reduceat(groups.gather(expected.n.astype(np.float64)), groups.offsets[:-1])
    variance = expected.variance(first, second, groups.counts, n).clip(min=0.0)
    scale = math.exp(largest)
    return scale * float(first.mean()), scale * math.sqrt(float(variance.sum())) / len(first)
