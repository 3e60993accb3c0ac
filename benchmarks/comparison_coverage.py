"""How often a comparison's 95 % intervals contain the true difference, beside a bootstrap's.

    python benchmarks/comparison_coverage.py [--draws N] [--output FILE]

Simulated differences d[s, p] = seed[s] + prompt[p] + rest[s, p] with true mean 0, normal or of one sign and
skewed (exponential), for the numbers of seeds and prompts that comparisons have. `crossed` is
`qrpo_core.evaluation.crossed`; `bootstrap` resamples prompts and seeds (percentiles of 200 resamples).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _result import about, options, publish

from qrpo_core.evaluation.crossed import CrossedMean

#: Seeds, prompts, standard deviations of seeds, prompts and the rest.
CASES = [
    (1, 300, 0.0, 1.0, 1.0),
    (2, 100, 0.0, 1.0, 1.0),
    (2, 100, 0.2, 1.0, 1.0),
    (2, 100, 1.0, 1.0, 1.0),
    (3, 300, 0.0, 0.5, 1.0),
    (3, 300, 0.15, 0.5, 1.0),
    (5, 300, 0.0, 0.0, 1.0),
    (5, 300, 0.0, 1.0, 1.0),
    (5, 300, 0.1, 1.0, 1.0),
    (5, 300, 0.3, 1.0, 1.0),
]
_RESAMPLES = 200


def draw(rng: np.random.Generator, case: tuple[int, int, float, float, float], skewed: bool) -> Any:
    """Differences of shape (seeds, prompts) with mean 0."""
    seeds, prompts, *spreads = case

    def part(spread: float, *shape: int) -> Any:
        return spread * (rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape))

    return part(spreads[0], seeds, 1) + part(spreads[1], 1, prompts) + part(spreads[2], seeds, prompts)


def bootstrap_covers(rng: np.random.Generator, numbers: Any) -> bool:
    """Whether the percentile interval of resampled prompts and seeds contains 0."""
    seeds, prompts = numbers.shape
    weights = [
        np.stack([np.bincount(row, minlength=size) for row in rng.integers(0, size, (_RESAMPLES, size))])
        for size in (seeds, prompts)
    ]
    means = ((weights[0] @ numbers) * weights[1]).sum(axis=1) / numbers.size
    low, high = np.quantile(means, [0.025, 0.975])
    return bool(low <= 0 <= high)


def measure(case: tuple[int, int, float, float, float], draws: int, *, skewed: bool) -> dict[str, Any]:
    """Both coverages of one case, and the mean width of the crossed intervals."""
    rng = np.random.default_rng(0)
    hits, boot, width = 0, 0, 0.0
    for _ in range(draws):
        numbers = draw(rng, case, skewed)
        mean = CrossedMean.of(numbers)
        half = mean.half_width(0.05)
        hits, width = hits + (abs(mean.value) <= half), width + 2 * half
        boot += bootstrap_covers(rng, numbers)
    names = ("seeds", "prompts", "spread_of_seeds", "spread_of_prompts", "spread_of_the_rest")
    found = dict(zip(names, case, strict=True)) | {"skewed": skewed}
    return found | {
        "crossed": round(hits / draws, 4),
        "bootstrap": round(boot / draws, 4),
        "mean_width": round(width / draws, 4),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    given = parser.parse_args()
    head = about("coverage of a comparison's intervals")
    cases = [measure(case, given.draws, skewed=skewed) for skewed in (False, True) for case in CASES]
    error = (0.05 * 0.95 / given.draws) ** 0.5
    result = head | {
        "draws": given.draws,
        "standard_error_at_95": round(error, 4),
        "cases": cases,
    }
    publish(result, given.output)


if __name__ == "__main__":
    main()
