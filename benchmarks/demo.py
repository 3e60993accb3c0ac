"""The demo as the README shows it: what it prints, how long it takes, and what the same command costs again.

    python benchmarks/demo.py [--seeds 5] [--set KEY=VALUE ...] [--output benchmarks/results/demo.json]

Runs `qrpo run experiments/demo.yaml` into a fresh store with a Prefect home of its own, then the same command
again, then `qrpo plan` with twice the references. The result holds what each printed (stages without their
progress; a path keeps its first and last parts), wall and processor time. README.md quotes this file; a test
compares.

With --seeds, training and evaluation are repeated with that many seeds of the training (the first is the
demo's own; references and completions before training are the same), and with --redraw everything is drawn
again by the seed, too. The result then has the gain of each, the difference of the mean reward of held-out
prompts with its 95 % interval, and the shares of replies that the length limit cuts before and after. Goals:
all gains above 0, no more cut replies than before, and the whole demo in 12 processor minutes. With --keep a
stopped benchmark goes on where it was: finished runs are taken from the folder, and each names its commit.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import ROOT, about, commit, options, publish

DEMO = "experiments/demo.yaml"
TWICE = "sampling.references_per_prompt=24"
#: A stage that is done, as standard error has it: two blanks, its name, what was computed or reused.
_STAGE = re.compile(r"^  \S.*(computed|reused) .*s\)$")
#: The gain among the lines of a run.
_GAIN = re.compile(r"^Difference, paired \(95 % interval\) +(\S+) \[(\S+), (\S+)\]$")

#: The shares of cut replies among them, before and after.
_CUT = re.compile(r"^Cut by the length limit before → after +(?:< )?(\S+) % → (?:< )?(\S+) %$")


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
        "commit": commit(),
        "command": " ".join(["qrpo", verb, DEMO, *(f"--set {each}" for each in overrides)]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "stages": [line for line in done.stderr.splitlines() if _STAGE.match(line)],
        "lines": [shown(line, store) for line in done.stdout.splitlines() if line.strip()],
    }


class Done:
    """The runs of a folder, which has the store, the Prefect home, and what each finished run printed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "runs.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._runs: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def once(self, name: str, verb: str, overrides: list[str]) -> dict[str, Any]:
        """A run by its name: as it is kept, or run now and kept."""
        if name not in self._runs:
            self._runs[name] = qrpo(verb, overrides, self._folder / "prefect", self._folder / ".qrpo")
            self._file.write_text(json.dumps(self._runs))
        found: dict[str, Any] = self._runs[name]
        return found


def gain(run: dict[str, Any], seed: int) -> dict[str, Any]:
    """The gain of a run, reward units; shares of replies that are cut, in percent; and what the run took."""
    (found,) = filter(None, map(_GAIN.match, run["lines"]))
    (cut,) = filter(None, map(_CUT.match, run["lines"]))
    value, low, high = (float(number.replace("−", "-")) for number in found.groups())
    return {
        "seed": seed,
        "commit": run["commit"],
        "command": run["command"],
        "gain": value,
        "interval": [low, high],
        "cut_percent": [float(number) for number in cut.groups()],
        "processor_minutes": round(run["processor_seconds"] / 60, 1),
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
    parser.add_argument("--seeds", type=int, default=1, help="trainings")
    parser.add_argument("--redraw", action="store_true", help="a seed draws its own references, too")
    parser.add_argument("--keep", type=Path, help="a folder for the store; a stopped benchmark goes on in it")
    given = parser.parse_args()
    overrides: list[str] = given.set
    goals = {"processor_minutes": 12, "gain": "above 0 with every seed", "cut_percent": "no rise"}
    head = about("demo", goals=goals)
    with tempfile.TemporaryDirectory() as scratch:
        done = Done(given.keep or Path(scratch))
        runs = {
            "run": done.once("run", "run", overrides),
            "again": done.once("again", "run", overrides),
            "plan": done.once("plan", "plan", [*overrides, TWICE]),
        }
        gains = [gain(runs["run"], 0)]
        for seed in range(1, given.seeds):
            seeds = [f"training.seed={seed}", *([f"sampling.seed={seed}"] if given.redraw else [])]
            gains.append(gain(done.once(f"seed {seed}", "run", [*overrides, *seeds]), seed))
            print(f"seed {seed}: {gains[-1]}", file=sys.stderr, flush=True)
    publish({**head, "seeds": gains, **runs}, given.output)


if __name__ == "__main__":
    main()
