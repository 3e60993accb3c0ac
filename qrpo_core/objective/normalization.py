"""The check that costs nothing: E_ref exp(target/beta) = E_ref pi*/pi_ref = 1 (method.md section 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, integers, same_length
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.targets import CalibratedTargets

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class NormalizationCheck:
    """How far the normaliser is from fitting the data: `mean` should be 1.

    mean : the mean over prompts of the prompt's mean of exp(target/beta); inf where it overflows.
    standard_error : of that mean, over prompts; nan with one prompt, inf where it overflows.
    log_mean : log of mean, finite where mean is not.
    prompts, references : how many went in.
    prompt_quantiles : (level, prompt mean) pairs at levels 0, 0.05, 0.25, 0.5, 0.75, 0.95 and 1.
    """

    mean: float
    standard_error: float
    log_mean: float
    prompts: int
    references: int
    prompt_quantiles: tuple[tuple[float, float], ...]


def normalization_check(targets: CalibratedTargets, prompt: ArrayLike) -> NormalizationCheck:
    """Mean of exp(target/beta) over reference completions, which must be 1 if the normaliser fits.

    Give it the targets of references: `reference_targets`, or held-out references ranked against the others.
    Under the `empirical` normaliser and its own references it is 1 by construction; there only held-out
    references tell something. With lengths (beta/|y|) it is a diagnostic rather than an identity, because
    each completion then has its own beta.

    Parameters
    ----------
    targets : [references].
    prompt : [references] integer codes; every prompt counts the same whatever its number of references.

    Raises
    ------
    ObjectiveError : no rows, unequal lengths.
    """
    codes = integers(prompt, what="prompt codes")
    log_ratio = targets.log_ratio
    if same_length(targets=log_ratio, prompt=codes) == 0:
        raise ObjectiveError("no reference targets to check")
    groups = group_by_prompt(codes)
    values, first = groups.gather(log_ratio), groups.offsets[:-1]
    top = np.maximum.reduceat(values, first)
    scaled = np.exp(values - np.repeat(top, groups.counts))
    log_means: FloatArray = top + np.log(np.add.reduceat(scaled, first) / groups.counts)
    largest = float(log_means.max())
    relative = np.exp(log_means - largest)  # prompt means in units of the largest one: no overflow
    log_mean = largest + math.log(float(relative.mean()))
    order = np.quantile(log_means, LEVELS, method="inverted_cdf").tolist()
    return NormalizationCheck(
        mean=_exp(log_mean),
        standard_error=_standard_error(relative, largest),
        log_mean=log_mean,
        prompts=len(first),
        references=len(codes),
        prompt_quantiles=tuple((level, _exp(value)) for level, value in zip(LEVELS, order, strict=True)),
    )


def _standard_error(relative: FloatArray, largest: float) -> float:
    if len(relative) < 2:
        return math.nan
    deviation = float(relative.std(ddof=1)) / math.sqrt(len(relative))
    return _exp(largest + math.log(deviation)) if deviation > 0 else 0.0


def _exp(value: float) -> float:
    """exp, with inf instead of an exception where it overflows."""
    return math.exp(value) if value < 709.0 else math.inf
