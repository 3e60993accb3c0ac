"""What a run that is killed soon after its first row has lost.

    python benchmarks/killed_run.py [--after 30 60 120] [--tries 3] [--set KEY=VALUE ...] [--output FILE]

`qrpo run experiments/demo.yaml` with twenty times the references gets SIGKILL, with its children, so many
seconds after its first row is in the store; each time on a copy of a store that has the model and the
prompts. So rows are in work at the kill, however long the start takes. Lost is the time from its last commit
to the kill: at most so much work is done again. `run_s` is the time from the run's start to the kill. Goal:
at most half of it is lost, so 15 s of 30.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

_COMMAND = ("run", "experiments/demo.yaml", "--set", "sampling.references_per_prompt=100")
_GOAL = 0.5


def commits(store: Path) -> list[float]:
    """When the blocks of the store were committed, in order."""
    return sorted(path.stat().st_mtime for path in store.glob("blocks/*/*/index/*.json"))


def killed(folder: Path, overrides: list[str], moment: Callable[[Path], float | None]) -> tuple[float, float]:
    """Run in a folder's store, and kill the run at the moment asked for; returns its start and that."""
    store = folder / "store"
    command = [sys.executable, "-m", "flows.cli", *_COMMAND, *overrides, "--set", f"store.path={store}"]
    environment = {**os.environ, "PREFECT_HOME": str(folder / "home")}
    begun = time.time()
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while (end := moment(store)) is None or time.time() < end:
            if run.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.05)
        end = time.time()
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return begun, end


def measured(after: float, overrides: list[str], prepared: Path, folder: Path) -> dict[str, Any]:
    """One run, killed so many seconds after its first commit of rows."""
    shutil.copytree(prepared, folder / "store")
    begun, end = killed(
        folder, overrides, lambda store: commits(store)[0] + after if commits(store) else None
    )
    made = commits(folder / "store")
    return {
        "after_s": after,
        "run_s": round(end - begun, 2),
        "lost_s": round(end - made[-1], 2),
        "blocks": len(made),
        "block_s": [round(late - early, 2) for early, late in itertools.pairwise(made)],
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--after", type=float, nargs="+", default=[30, 60, 120])
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    wanted = parser.parse_args()
    overrides = [word for each in wanted.set for word in ("--set", each)]
    result = about("killed_run", goals={"lost_share_of_run_s_at_most": _GOAL})
    result["qrpo"] = " ".join(("qrpo", *_COMMAND, *overrides))
    result["runs"] = []
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        first.mkdir()
        killed(first, overrides, lambda store: min(commits(store), default=None))
        shutil.rmtree(first / "store/blocks")
        for after in wanted.after:
            for number in range(wanted.tries):
                folder = Path(scratch) / f"{after}-{number}"
                folder.mkdir()
                result["runs"].append(measured(after, overrides, first / "store", folder))
    result["most_lost_share"] = round(max(run["lost_s"] / run["run_s"] for run in result["runs"]), 3)
    publish(result, wanted.output)


if __name__ == "__main__":
    main()
