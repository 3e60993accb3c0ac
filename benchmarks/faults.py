"""What a run survives: every fault many times, on both back ends, and what each cost.

    python benchmarks/faults.py [--seed 0] [--output benchmarks/results/faults.json]
    python benchmarks/faults.py --share 0.2      # a fifth of the injections: shows that it runs

The scenarios are those of the test suite (tests/faults), with more injections: whole pre-computations of 72
rows (samples, rewards and log-probs of 6 prompts) in blocks of 5, killed, cut off, refused and damaged, and
run again until done. The table is printed as Markdown, for docs/reference/faults.md. Needs the development
dependencies (the S3 server is one of them) and some minutes of two cores.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

from _result import about, options, publish
from _s3_server import BUCKET, s3_server

from qrpo_core.config import StoreConfig
from tests.conftest import write_tiny_model
from tests.faults import s3_scenarios, scenarios
from tests.faults.accounts import Outcome, total
from tests.faults.scenarios import DAMAGE, Ground, local
from tests.faults.scene import Truth, settings

Scenario = Callable[[], Outcome]

#: Column of the table → field of an outcome.
COLUMNS = {
    "fault": "fault",
    "back end": "back_end",
    "injected": "injected",
    "rows bought": "bought",
    "rows lost": "lost",
    "bought twice": "twice",
    "of them in flight": "in_flight",
    "of them destroyed": "destroyed",
    "wrong rows": "wrong",
}


def everywhere(ground: Ground, seed: int, share: float) -> list[Scenario]:
    """The faults of every back end; share : of the injections of the table, at least one each."""

    def some(count: int) -> int:
        return max(1, round(share * count))

    return [
        lambda: scenarios.sigkills(ground, some(20), seed),
        lambda: scenarios.commit_kills(ground, some(18), seed),
        lambda: scenarios.interrupts(ground, some(6), seed),
        lambda: scenarios.race(ground, some(16)),
        lambda: total([scenarios.two_budgets(ground) for _ in range(some(3))]),
        *(partial(scenarios.damage, ground, [what] * some(3), seed) for what in DAMAGE),
        lambda: scenarios.damaged_artifacts(ground, seed),
        lambda: scenarios.jumping_clock(ground, some(6), seed),
    ]


def of_directories(ground: Ground, seed: int, share: float) -> list[Scenario]:
    """The faults of a disk."""
    return [lambda: scenarios.full_disk(ground, max(1, round(6 * share)), seed), lambda: _small_disk(ground)]


def of_networks(ground: Ground, endpoint: str, seed: int) -> list[Scenario]:
    """The faults between us and a server."""
    return [partial(scenario, ground, endpoint, seed) for scenario in s3_scenarios.ALL.values()]


def _small_disk(ground: Ground) -> Outcome:
    """On a file system of 128 KiB; an outcome with 0 injections where we may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            return Outcome("a disk too small", "directory", 0, detail="could not mount one here")
        try:
            grow = partial(subprocess.run, ["mount", "-o", "remount,size=16m", folder], check=True)
            return scenarios.small_disk(ground, Path(folder), grow)
        finally:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def grounds(folder: Path) -> Iterator[tuple[Ground, Ground, str]]:
    """A directory, a bucket of a SeaweedFS server of our own, and the server's URL."""
    experiment = settings(folder, write_tiny_model(folder / "model"))
    truth = Truth(folder, experiment)
    os.environ["QRPO_CACHE"] = str(folder / "cache")
    with s3_server(folder / "server") as url:

        def bucket(_: Path) -> StoreConfig:
            path = f"s3://{BUCKET}/{secrets.token_hex(6)}"
            return StoreConfig(path=path, endpoint_url=url, path_style=True, rows_per_block=5)

        yield Ground(folder, experiment, truth, local), Ground(folder, experiment, truth, bucket), url


def run(named: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Outcomes as they come; one that cannot be had is an error, for nothing here may be passed over."""
    found = []
    for scenario in named:
        started = time.perf_counter()
        outcome = scenario()
        seconds = round(time.perf_counter() - started, 1)
        print(f"{seconds:6.1f} s  {outcome}", file=sys.stderr, flush=True)
        found.append({**asdict(outcome), "seconds": seconds})
    return found


def markdown(outcomes: Sequence[dict[str, Any]]) -> str:
    """The table of docs/reference/faults.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for outcome in outcomes:
        if outcome["injected"]:
            lines.append("| " + " | ".join(str(outcome[name]) for name in COLUMNS.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0)
    arguments = parser.parse_args()
    result = about("faults over whole pre-computations, on a directory and on SeaweedFS")
    given = arguments.seed, arguments.share
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, grounds(Path(folder)) as (directory, bucket, url):
        outcomes = run([*everywhere(directory, *given), *of_directories(directory, *given)])
        outcomes += run([*everywhere(bucket, *given), *of_networks(bucket, url, arguments.seed)])
    result |= {"seconds": round(time.perf_counter() - started, 1), "outcomes": outcomes}
    publish(result, arguments.output, shown=markdown(outcomes))


if __name__ == "__main__":
    main()
