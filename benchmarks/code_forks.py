"""Programs of the reward `code` forked, against a sandbox and an interpreter for each, in the same run.

    python benchmarks/code_forks.py [--data ../shared/data] [--rows N] [--round N] [--processes N]
        [--output benchmarks/results/code_forks.json]

Both ways score the same rows of MBPP in rounds that alternate, so that other work on the machine meets both.
`solutions` are the reference solutions. `wrong` are each problem with the next one's program: most fail, some
in ways of their own. Goal: 5 times the rows a second on `solutions`, and every row with the same score. MBPP
123 is left out: its solution computes for seconds, which no way of starting it changes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from _result import about, options, publish
from code_reward import MBPP, solutions

from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.code.formats import read_problem
from qrpo_core.rewards.code.reward import CodeReward

WAYS = {"forked": True, "a sandbox a program": False}
LEFT_OUT = {"mbpp 123"}


def wrong(rows: list[RewardRequest]) -> list[RewardRequest]:
    """Each problem with the program of the next, under the name that its tests call."""
    made = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        name = read_problem(row.ground_truth or "", "mbpp").names[-1]
        theirs = re.findall(r"^def (\w+)", other.text, re.MULTILINE)
        text = other.text.removesuffix("```") + (f"{name} = {theirs[-1]}\n```" if theirs else "```")
        made.append(replace(row, prompt_id=f"{row.prompt_id}, wrong", text=text))
    return made


def reward(forks: bool, processes: int | None) -> CodeReward:
    """The reward with programs started one way."""
    made = CodeReward(CodeRewardConfig(format="mbpp", processes=processes))
    made.problems([])
    assert made.mode is not None
    if forks and not made.mode.forks:
        raise SystemExit("programs cannot be forked on this machine: see qrpo doctor")
    made.mode = replace(made.mode, forks=forks)
    return made


def measure(rows: list[RewardRequest], size: int, processes: int | None) -> dict[str, Any]:
    """Rates of both ways, their ratio, and the table of verdicts."""
    rewards = {way: reward(forks, processes) for way, forks in WAYS.items()}
    for each in rewards.values():  # a run checks its ground truths once, before anything is scored
        each.problems((row.prompt_id, row.ground_truth) for row in rows)
    scores: dict[str, list[Score]] = {way: [] for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, start in enumerate(range(0, len(rows), size)):
        for way in list(WAYS)[:: 1 if number % 2 else -1]:
            begin = perf_counter()
            scores[way] += rewards[way].score(rows[start : start + size])
            seconds[way].append(perf_counter() - begin)
    forked, apart = (scores[way] for way in WAYS)
    ratios = [slow / fast for fast, slow in zip(*(seconds[way] for way in WAYS), strict=True)]
    unequal = [each for each in zip(rows, forked, apart, strict=True) if each[1] != each[2]]
    return {
        "rows": len(rows),
        "rounds": len(ratios),
        "rows_per_second": {way: round(len(rows) / sum(seconds[way]), 2) for way in WAYS},
        "ratio": round(sum(seconds["a sandbox a program"]) / sum(seconds["forked"]), 2),
        "ratio_of_rounds": {f.__name__: round(f(ratios), 2) for f in (min, median, max)},
        "verdicts": {way: table(scores[way]) for way in WAYS},
        "rows_with_unequal_scores": {
            row.prompt_id: f"forked: {one}; a sandbox a program: {other}" for row, one, other in unequal
        },
    }


def table(scores: list[Score]) -> dict[str, int]:
    """How many rows have each verdict."""
    names = (score.status + ("" if score.reward is None else f" {score.reward:.3f}") for score in scores)
    return dict(sorted(Counter(names).items()))


def main() -> None:
    """Measure, print, and write with --output."""
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, help="the first rows only")
    parser.add_argument("--round", type=int, default=244, help="rows that one way scores before the other")
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    result = about("programs forked, against a sandbox for each", goal={"ratio": 5, "unequal_scores": 0})
    rows = [row for row in solutions(arguments.data / MBPP, "mbpp") if row.prompt_id not in LEFT_OUT]
    rows = rows[: arguments.rows]
    for name, part in (("solutions", rows), ("wrong", wrong(rows))):
        result[name] = measure(part, arguments.round, arguments.processes)
        print(name, json.dumps(result[name], indent=1), flush=True)
    publish(result, arguments.output, shown="")


if __name__ == "__main__":
    main()
