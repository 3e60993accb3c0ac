"""The pool report of an experiment in the store, as text for a terminal and as a line of the plan."""

from __future__ import annotations

from pathlib import Path

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.pool_report import pool_steps, stored_report
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.pool_text import headline, pool_lines
from qrpo_core.store.manifest import Manifest


def found_report(workspace: Workspace) -> Manifest | None:
    """The artifact of the report, or None if `qrpo pool` has to make it.

    Raises MissingError where the pool is not in the store, ConfigError where no report can be made of it.
    """
    try:
        known = stored_steps(workspace)
    except MissingError as error:
        remedy = "qrpo run EXPERIMENT --flow precompute draws and scores the references"
        raise MissingError(error.message, where=error.where, remedy=remedy) from None
    steps = pool_steps(known)
    made = workspace.artifacts.find(steps.recipe)
    if made is None:
        steps.require_pool()
    return made


def report_lines(workspace: Workspace, made: Manifest) -> list[str]:
    """The report, and the path of its page."""
    return [*pool_lines(stored_report(made)), "", f"Page: {page_path(workspace, made)}"]


def page_path(workspace: Workspace, made: Manifest) -> Path:
    """A local path of the page; downloaded once from a remote store."""
    return workspace.artifacts.file(made, "pool.html")


def plan_line(workspace: Workspace) -> str:
    """One line: the report's headline, or how to make the report."""
    try:
        made = found_report(workspace)
    except MissingError as error:
        return f"Pool report: none yet ({error.message}); `qrpo pool EXPERIMENT` makes it after `precompute`."
    except QRPOError as error:
        return f"Pool report: none ({error.message})."
    if made is not None:
        return f"Pool report: {headline(stored_report(made))}"
    judges = workspace.experiment.evaluation.judges
    what = f", with scores by {', '.join(judges)}" if judges else ""
    return f"Pool report: not made yet; `qrpo pool EXPERIMENT` makes it before you train{what}."
