"""`qrpo pool`: make the pool report unless the store has it, and print it."""

from __future__ import annotations

import shutil
from pathlib import Path

from qrpo_core.config import Experiment
from qrpo_core.inspection.pool_report import found_report, page_path, report_lines
from qrpo_core.pipeline.workspace import Workspace


def pool(experiment: Experiment, out: Path | None, as_json: bool) -> int:
    """Print the report, or its JSON; returns the exit status. out : copy the page to this file."""
    workspace = Workspace(experiment)
    made = found_report(workspace)
    if made is None:
        from flows.cli.run import run

        run(experiment, "pool_report")
        workspace = Workspace(experiment)
        made = found_report(workspace)
        assert made is not None  # the flow has just made it
    if out is not None:
        shutil.copyfile(page_path(workspace, made), out)
    if as_json:
        print(workspace.artifacts.read(made, "pool.json").decode())
    else:
        print("\n".join(report_lines(workspace, made)))
    return 0
