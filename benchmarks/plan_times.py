"""Compare a plan made before anything ran, after the probe, with the run that follows, stage by stage.

    python benchmarks/plan_times.py --output benchmarks/results/plan_times.json
    python benchmarks/plan_times.py --experiments experiments/demo.yaml --keep FOLDER

Each experiment gets a fresh store: `qrpo plan --probe --json`, then `qrpo run`. Stages whose run took 30 s or
more are compared; the goal is a ratio of at most 1.5 either way for each of them. The probe's own rows are in
the store when the plan is made, so plan and run have the same rows to compute. Needs a quiet machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

EXPERIMENTS = ("experiments/demo.yaml", "experiments/arithmetic.yaml")
#: Shortest stage that is compared, in seconds, and the goal.
SHORTEST, GOAL = 30.0, 1.5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS))
    parser.add_argument("--keep", type=Path, help="folder for the stores (default: a temporary one)")
    given = parser.parse_args()
    result = about(
        "the expected times of a plan, after the probe, beside those of the run",
        goals={"ratio": GOAL, "of stages of seconds": SHORTEST},
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.keep or Path(scratch)).resolve()
        found = {each: compare(ROOT / each, folder / Path(each).stem) for each in given.experiments}
    publish(result | {"seconds": round(time.monotonic() - started), "experiments": found}, given.output)


def compare(experiment: Path, folder: Path) -> dict[str, Any]:
    """The expected and measured seconds of each stage, and the largest ratio of those that are compared."""
    folder.mkdir(parents=True)
    store = ("--set", f"store.path={folder / 'store'}")
    began = time.monotonic()
    planned = json.loads(qrpo(folder, "plan", str(experiment), *store, "--probe", "--json").stdout)
    probed = time.monotonic() - began
    ran = qrpo(folder, "run", str(experiment), *store)
    took = stages_of(ran.stderr)
    stages = {}
    for each in planned["stages"]:
        name, expected = each["stage"], each["expected"]
        if each["missing"] and name in took:
            seconds = None if expected is None else round(expected["seconds"], 1)
            ratio = None if not seconds or not took[name] else round(took[name] / seconds, 3)
            source = None if expected is None else expected["source"]
            stages[name] = {"expected": seconds, "took": took[name], "ratio": ratio, "source": source}
    compared = [each["ratio"] for each in stages.values() if each["took"] >= SHORTEST]
    worst = None if None in compared else max((max(each, 1 / each) for each in compared), default=None)
    return {"probe_and_plan_seconds": round(probed, 1), "worst_ratio": worst, "stages": stages}


def stages_of(text: str) -> dict[str, float]:
    """Seconds of each stage by the lines of a run: `  train policy    1 artifact computed (225.5 s)`."""
    done = r"^  (\S[^\n]*?) +(?:cached, )?[\d,]+ (?:rows|artifact)[^\n]* \(([\d.]+) s\)$"
    lines = re.findall(done, text, re.M)
    return {name: float(seconds) for name, seconds in lines}


def qrpo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a server and a cache of its own; its error ends this script."""
    own = {"PREFECT_HOME": str(folder / "prefect"), "QRPO_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    environment = os.environ | own | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done


if __name__ == "__main__":
    main()
