"""Rank counts of a whole table: 10 million reference rewards, 200,000 prompts, 400,000 samples.

    python benchmarks/quantile_table.py [--repeats 5] [--output benchmarks/results/quantile_table.json]

Goal: at most 3 seconds and 1 GB on two cores. Each repetition runs in a process of its own, so that peak
memory is that of one call with its inputs, and pages are cold as they are in a pipeline run. References of a
prompt range from 20 to 80 and the rows are in random order (the hard case: nothing is grouped).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _result import about, publish

from qrpo_core.objective.quantiles import rank_counts_table

REFERENCES, PROMPTS, SAMPLES = 10_000_000, 200_000, 400_000


def table(ties: bool) -> tuple[np.ndarray, ...]:
    """(sample prompts, sample rewards, reference prompts, reference rewards), shuffled and ragged."""
    rng = np.random.default_rng(0)
    share = rng.integers(20, 81, PROMPTS)
    ends = np.round(np.cumsum(share) * (REFERENCES / share.sum())).astype(np.int64)
    reference_prompt = np.repeat(np.arange(PROMPTS), np.diff(ends, prepend=0))
    rng.shuffle(reference_prompt)
    prompt = rng.permutation(np.repeat(np.arange(PROMPTS), SAMPLES // PROMPTS))
    if ties:  # fraction of ten tests passed
        return (
            prompt,
            rng.integers(0, 11, SAMPLES) / 10,
            reference_prompt,
            rng.integers(0, 11, REFERENCES) / 10,
        )
    return prompt, rng.normal(size=SAMPLES), reference_prompt, rng.normal(size=REFERENCES)


def one(ties: bool) -> dict[str, float]:
    """Seconds (wall and CPU) and peak resident memory of one call in this process."""
    columns = table(ties)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    counts = rank_counts_table(*columns, in_pool=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert len(counts) == SAMPLES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_rss_gb": peak * 1024 / 1e9,
        "inputs_rss_gb": before * 1024 / 1e9,
    }


def run(ties: bool, repeats: int) -> dict[str, object]:
    """Repetitions in fresh processes: median and best."""
    command = [sys.executable, __file__, "--one", "ties" if ties else "distinct"]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)
    ]
    return {
        "seconds_median": round(statistics.median(row["seconds"] for row in found), 3),
        "seconds_best": round(min(row["seconds"] for row in found), 3),
        "cpu_seconds_median": round(statistics.median(row["cpu_seconds"] for row in found), 3),
        "cpu_seconds_best": round(min(row["cpu_seconds"] for row in found), 3),
        "peak_rss_gb": round(max(row["peak_rss_gb"] for row in found), 3),
        "inputs_rss_gb": round(max(row["inputs_rss_gb"] for row in found), 3),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=["distinct", "ties"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one == "ties")))
        return
    result = about(
        "rank_counts_table: 10M reference rewards, 200k ragged prompts, 400k samples, shuffled",
        goal={"seconds": 3.0, "peak_rss_gb": 1.0, "cores": 2},
        versions={"numpy": np.__version__},
    )
    result |= {
        "distinct_rewards": run(False, arguments.repeats),
        "tied_rewards": run(True, arguments.repeats),
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
