"""A budget raised from n to 2n: the rows it adds, and what the stage costs beside computing them.

    python benchmarks/top_up.py [--references 4] [--prompts 48] [--output benchmarks/results/top_up.json]

The demo's model, prompts and reward through the real flow `precompute` on a server of its own, into a fresh
store: first n references a prompt, then 2n, then 2n again. Goals: exactly n new rows a prompt, counted from
the store; the wall time of the stage is that of its blocks within 10 %; with nothing missing the whole
command takes at most 20 s (measured by the clock around `qrpo run`, server and imports included).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace

DEMO = ROOT / "experiments" / "demo.yaml"


def settings(store: Path, prompts: int, references: int) -> list[str]:
    """Overrides of the demo."""
    return [
        f"store.path={store}",
        f"prompts.size={prompts}",
        f"sampling.references_per_prompt={references}",
        "training_data={mode: random}",
    ]


def run(overrides: list[str], home: Path) -> float:
    """`qrpo run --flow precompute` in a process of its own; its wall time."""
    command = [sys.executable, "-m", "flows.cli", "run", str(DEMO), "--flow", "precompute"]
    for override in overrides:
        command += ["--set", override]
    started = time.perf_counter()
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return time.perf_counter() - started


def stage_seconds(home: Path, stage: str) -> float:
    """The stage's wall time in the last flow run, from the table that it published in the UI."""
    import sqlite3

    with sqlite3.connect(home / "prefect.db") as database:
        query = "select data from artifact where key = 'stages' order by created desc limit 1"
        (data,) = database.execute(query).fetchone()
    rows = json.loads(json.loads(data)) if isinstance(json.loads(data), str) else json.loads(data)
    return next(float(row["seconds"]) for row in rows if row["stage"] == stage)


def rows_and_seconds(overrides: list[str]) -> tuple[Counter[str], dict[str, float]]:
    """Reference rows of each prompt, and the compute time of each block, both from the store."""
    workspace = Workspace(load_experiment(DEMO, overrides))
    samples, _ = reference_steps(workspace)
    rows: Counter[str] = Counter()
    seconds = {}
    for block in workspace.blocks.committed(samples.recipe):
        seconds[block.block] = block.seconds
        for row_range in block.ranges:
            rows[row_range.key] += row_range.count
    return rows, seconds


def measure(prompts: int, references: int) -> dict[str, Any]:
    """The three runs and what they say."""
    with tempfile.TemporaryDirectory(prefix="qrpo-top-up-") as scratch:
        store, home = Path(scratch) / "store", Path(scratch) / "prefect"
        small, large = (settings(store, prompts, n) for n in (references, 2 * references))
        run(small, home)
        before, first = rows_and_seconds(small)
        run(large, home)
        after, all_blocks = rows_and_seconds(large)
        stage = stage_seconds(home, "sample references")
        nothing = run(large, home)
    added = {after[prompt] - before[prompt] for prompt in after}
    new = sum(seconds for block, seconds in all_blocks.items() if block not in first)
    return {
        "prompts": len(after),
        "references": [references, 2 * references],
        "rows_added_a_prompt": sorted(added),
        "stage_seconds": stage,
        "seconds_of_its_blocks": round(new, 1),
        "stage_over_blocks": round(stage / new, 3),
        "first_budget_seconds_of_blocks": round(sum(first.values()), 1),
        "nothing_missing_seconds": round(nothing, 1),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=48)
    arguments = parser.parse_args()
    goals = {
        "rows_added_a_prompt": [arguments.references],
        "stage_over_blocks": 1.1,
        "nothing_missing_seconds": 20,
    }
    head = about("references raised from n to 2n", goals=goals)
    publish(head | measure(arguments.prompts, arguments.references), arguments.output)


if __name__ == "__main__":
    main()
