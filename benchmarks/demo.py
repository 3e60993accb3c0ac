"""The demo as the README shows it: what it prints, how long it takes, and what the same command costs again.

    python benchmarks/demo.py [--set KEY=VALUE ...] [--output benchmarks/results/demo.json]

Runs `qrpo run experiments/demo.yaml` into a fresh store with a Prefect home of its own, then the same command
again, then `qrpo plan` with twice the references. The result holds what each printed (stages without their
progress; a path keeps its first and last parts), wall and processor time. README.md quotes this file; a test
compares.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

DEMO = "experiments/demo.yaml"
TWICE = "sampling.references_per_prompt=10"
#: A stage that is done, as standard error has it: two blanks, its name, what was computed or reused.
_STAGE = re.compile(r"^  \S.*(computed|reused) .*s\)$")


def qrpo(verb: str, overrides: list[str], home: Path, store: Path) -> dict[str, Any]:
    """One command: what it printed, its seconds, and processor seconds with its children's."""
    command = [sys.executable, "-m", "flows.cli", verb, DEMO, "--set", f"store.path={store}"]
    for override in overrides:
        command += ["--set", override]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "command": " ".join(["qrpo", verb, DEMO, *(f"--set {each}" for each in overrides)]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "stages": [line for line in done.stderr.splitlines() if _STAGE.match(line)],
        "lines": [shown(line, store) for line in done.stdout.splitlines() if line.strip()],
    }


def shown(line: str, store: Path) -> str:
    """A line as the README has it: the store is .qrpo, digests keep their first eight characters."""
    short = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1…", line.replace(str(store), "…/.qrpo"))
    return short.rstrip()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the demo"
    )
    given = parser.parse_args()
    overrides: list[str] = given.set
    head = about("demo")
    with tempfile.TemporaryDirectory() as scratch:
        home, store = Path(scratch) / "prefect", Path(scratch) / ".qrpo"
        runs = {
            "run": qrpo("run", overrides, home, store),
            "again": qrpo("run", overrides, home, store),
            "plan": qrpo("plan", [*overrides, TWICE], home, store),
        }
    publish({**head, **runs}, given.output)


if __name__ == "__main__":
    main()
