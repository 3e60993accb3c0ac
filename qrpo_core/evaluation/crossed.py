"""Means over two crossed factors, prompts and training seeds, with intervals; and Holm's correction.

Every seed's policy answers the same prompts, so a mean over S seeds and P prompts varies with both. With
d[s, p] = mean + seed[s] + prompt[p] + rest[s, p] the two-way analysis of variance estimates the variance of
the mean from its parts, and each part brings its own Student quantile (the modified large-sample method of
Graybill and Wang, JASA 75, 1980; for differences of mean squares Ting et al., J. Stat. Comput. Simul. 35,
1990). A bootstrap that resamples prompts and seeds is not used: a few seeds show it too little of what seeds
do, and its intervals are too narrow (benchmarks/results/comparison_coverage.json has both coverages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qrpo_core.evaluation.inputs import Floats
from qrpo_core.evaluation.results import Estimate

#: Below this a p-value is 0.
_LEAST = 1e-30


@dataclass(frozen=True)
class CrossedMean:
    """The mean of one number for each seed and prompt.

    parts : (variance of the mean, degrees of freedom) of prompts and of seeds; empty with a single prompt.
    """

    value: float
    parts: tuple[tuple[float, int], ...]

    @classmethod
    def of(cls, numbers: Floats) -> CrossedMean:
        """The mean of finite numbers of shape (S, P). With one seed it varies with the prompts alone."""
        seeds, prompts = numbers.shape
        value = float(numbers.mean())
        if prompts < 2:
            return cls(value, ())
        by_prompt, by_seed = numbers.mean(axis=0), numbers.mean(axis=1)
        of_prompts = float(by_prompt.var(ddof=1)) / prompts
        parts = [(of_prompts, prompts - 1)]
        if seeds > 1:
            rest = numbers - by_seed[:, None] - by_prompt[None, :] + value
            chance = float(np.square(rest).sum()) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
            # Means of prompts and of seeds both vary with the rest. It counts once, with the prompts.
            of_seeds = max(float(by_seed.var(ddof=1)) / seeds - chance, 0.0)
            parts = [(max(of_prompts, chance), prompts - 1), (of_seeds, seeds - 1)]
        # What rounding leaves of equal numbers is no spread.
        if math.sqrt(sum(part for part, _ in parts)) <= 1e-12 * float(np.abs(numbers).max()):
            parts = [(0.0, free) for _, free in parts]
        return cls(value, tuple(parts))

    @property
    def standard_error(self) -> float | None:
        """The square root of the variance of the mean; None with a single prompt."""
        return math.sqrt(sum(part for part, _ in self.parts)) if self.parts else None

    def half_width(self, level: float) -> float:
        """Half the width of the interval that misses the true mean with probability `level`."""
        from scipy.special import stdtrit

        return math.hypot(*(math.sqrt(part) * float(stdtrit(free, level / 2)) for part, free in self.parts))

    def estimate(self, confidence: float) -> Estimate:
        """The mean with its interval; no ends with a single prompt."""
        if not self.parts:
            return Estimate(self.value, None, None)
        half = self.half_width(1 - confidence)
        return Estimate(self.value, self.value - half, self.value + half)

    @property
    def p_value(self) -> float:
        """The largest level at which the interval contains 0; 1 with a single prompt."""
        from scipy.optimize import brentq

        error, size = self.standard_error, abs(self.value)
        if error is None or size == 0:
            return 1.0
        if error == 0 or self.half_width(_LEAST) < size:
            return 0.0
        log_level = brentq(lambda level: self.half_width(math.exp(level)) - size, math.log(_LEAST), 0.0)
        return math.exp(float(log_level))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below a level errs anywhere with at most that probability.

    Holm's step-down method (Scandinavian Journal of Statistics 6, 1979); it needs no independence.
    """
    found = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(found, kind="stable")
    adjusted = np.empty_like(found)
    adjusted[order] = np.minimum(np.maximum.accumulate(found[order] * np.arange(found.size, 0, -1)), 1.0)
    return [float(each) for each in adjusted]
