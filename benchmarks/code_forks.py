"""Programs of the reward `code` forked, against a sandbox and an interpreter for each, in the same run.

    python benchmarks/code_forks.py [--data ../shared/data] [--rows N] [--round N] [--processes N]
        [--before CHECKOUT] [--output benchmarks/results/code_forks.json]

All ways score the same rows of MBPP in rounds that alternate, so that other work on the machine meets all.
`solutions` are the reference solutions. `wrong` are each problem with the next one's program: most fail, some
in ways of their own. Goal: 5 times the rows a second on `solutions`, and every row with the same score. MBPP
123 is left out: its solution computes for seconds, which no way of starting it changes. With --before the
reward of another checkout (`git worktree add CHECKOUT 2c6d8da`) scores them, too, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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
BEFORE = "before"
LEFT_OUT = {"mbpp 123"}

#: A batch of rows → its seconds and scores.
Scorer = Callable[[list[RewardRequest]], tuple[float, list[Score]]]


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


def timed(made: CodeReward, rows: list[RewardRequest]) -> Scorer:
    """A way of this checkout. A run checks its ground truths once, before anything is scored."""
    made.problems((row.prompt_id, row.ground_truth) for row in rows)

    def score(batch: list[RewardRequest]) -> tuple[float, list[Score]]:
        begin = perf_counter()
        scores = made.score(batch)
        return perf_counter() - begin, scores

    return score


class Earlier:
    """The reward of another checkout in a process of its own."""

    def __init__(self, checkout: Path, processes: int | None) -> None:
        found = subprocess.run(
            ["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        )
        self.commit = found.stdout.strip()
        command = [sys.executable, str(Path(__file__).with_name("_code_before.py"))]
        command += [] if processes is None else [str(processes)]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        self._child = subprocess.Popen(
            command, cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read()

    def __call__(self, batch: list[RewardRequest]) -> tuple[float, list[Score]]:
        assert self._child.stdin is not None
        rows = [(row.prompt_id, row.text, row.ground_truth) for row in batch]
        print(json.dumps(rows), file=self._child.stdin, flush=True)
        found = self._read()
        return found["seconds"], [Score(reward, status) for status, reward in found["scores"]]

    def _read(self) -> Any:
        assert self._child.stdout is not None
        if not (line := self._child.stdout.readline()):
            raise SystemExit(f"the reward of {self.commit} ended with {self._child.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def measure(rows: list[RewardRequest], size: int, ways: dict[str, Scorer]) -> dict[str, Any]:
    """Rates of all ways, ratios to the first, and the tables of verdicts."""
    scores: dict[str, list[Score]] = {way: [] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number, start in enumerate(range(0, len(rows), size)):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            took, found = ways[way](rows[start : start + size])
            scores[way] += found
            seconds[way].append(took)
    first, *others = ways
    return {
        "rows": len(rows),
        "rounds": len(seconds[first]),
        "rows_per_second": {way: round(len(rows) / sum(seconds[way]), 2) for way in ways},
        "verdicts": {way: table(scores[way]) for way in ways},
        f"{first}, against": {
            way: {
                "ratio": round(sum(seconds[way]) / sum(seconds[first]), 2),
                "ratio_of_rounds": spread(seconds[way], seconds[first]),
                "rows_with_unequal_scores": {
                    row.prompt_id: f"{first}: {one}; {way}: {other}"
                    for row, one, other in zip(rows, scores[first], scores[way], strict=True)
                    if (one.status, one.reward) != (other.status, other.reward)
                },
            }
            for way in others
        },
    }


def spread(slow: list[float], fast: list[float]) -> dict[str, float]:
    """The least, the median and the largest ratio of two ways in one round."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return {f.__name__: round(f(ratios), 2) for f in (min, median, max)}


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
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    arguments = parser.parse_args()
    result = about("programs forked, against a sandbox for each", goal={"ratio": 5, "unequal_scores": 0})
    rows = [row for row in solutions(arguments.data / MBPP, "mbpp") if row.prompt_id not in LEFT_OUT]
    rows = rows[: arguments.rows]
    earlier = None if arguments.before is None else Earlier(arguments.before, arguments.processes)
    if earlier is not None:
        result[f"commit {BEFORE}"] = earlier.commit
    for name, part in (("solutions", rows), ("wrong", wrong(rows))):
        ways = {way: timed(reward(forks, arguments.processes), part) for way, forks in WAYS.items()}
        result[name] = measure(part, arguments.round, ways | ({BEFORE: earlier} if earlier else {}))
        print(name, json.dumps(result[name], indent=1), flush=True)
    if earlier is not None:
        earlier.close()
    publish(result, arguments.output, shown="")


if __name__ == "__main__":
    main()
