"""What each training process runs: ``python -m qrpo_core.training JOB``.

The pipeline starts it through launch.py. By hand, on several machines that share a filesystem, with JOB
written by `qrpo_core.training.launch.write_job`, on each of them::

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m qrpo_core.training JOB

It writes the policy to the `out` of JOB/job.json, the logged metrics to JOB/history.json, and the comparison
of saved and trained policy to JOB/scored_rows.json. After a kill the same command resumes from the last
checkpoint in JOB. Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from qrpo_core.common.die_with_parent import die_with_parent
from qrpo_core.common.errors import QRPOError
from qrpo_core.training.launch import AGENT, COMPARISON, FAILURE, HISTORY, PROGRESS, read_job, write_failure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qrpo_core.training", description="Train a job that write_job wrote."
    )
    parser.add_argument("job", type=Path, help="a directory that write_job wrote")
    job = parser.parse_args(arguments).job.absolute()
    if AGENT in os.environ:
        die_with_parent(int(os.environ[AGENT]))
    try:
        _train(job)
    except Exception as error:
        write_failure(job, error)
        if not isinstance(error, QRPOError):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _train(job: Path) -> None:
    items, settings = read_job(job)

    from qrpo_core.training.run import train_here

    def on_step(step: int, steps: int, logged: dict[str, float]) -> None:
        with (job / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps([step, steps, logged]) + "\n")

    done = train_here(items, **settings, on_step=on_step)
    if done.comparison is not None:
        (job / COMPARISON).write_bytes(done.comparison.to_json())
        new = job / f"{HISTORY}.new"
        new.write_text(json.dumps(done.history), encoding="utf-8")
        os.replace(new, job / HISTORY)
        (job / FAILURE).unlink(missing_ok=True)  # of an earlier run by hand


if __name__ == "__main__":
    sys.exit(main())
