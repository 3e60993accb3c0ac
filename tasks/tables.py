"""What the UI shows of a run beside its progress: the plan, the stages, the result with its figures.

Nothing here fails a run: what cannot be shown is a warning (`tasks.progress.shown`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from prefect import runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext

from qrpo_core.config import Experiment
from qrpo_core.evaluation.summary import outcome, summary_rows
from qrpo_core.plan import plan
from qrpo_core.show import Results, headline_lines, plan_lines, plan_row, results, saved_rows
from qrpo_core.steps.evaluation import result_of
from qrpo_core.steps.workspace import Workspace
from tasks.cost import Meter, counts_rows, experiment_of_run, meter
from tasks.figures import figures
from tasks.names import facts
from tasks.progress import shown
from tasks.stages import Stage

#: Most letters that an artifact's figures may take: the server keeps every artifact of every run.
MOST_LETTERS = 400_000


def publish_plan(workspace: Workspace) -> None:
    """What the run that starts here will compute and why: what `qrpo plan` prints.

    Shown once, by the run that was started: what `align` calls is part of its plan.
    """
    if _was_started():
        shown(lambda: _plan(workspace))


def publish_stages(stages: Sequence[Stage]) -> None:
    """A table of what each stage of this flow run reused and computed, how fast, and at what cost."""
    shown(lambda: _stages(stages))


def publish_result(workspace: Workspace) -> None:
    """The evaluation's table, and the result: headlines, figures of the report, where policy and report are.

    Shown once, by the run that was started: that of `align` has it, and not the `evaluate` in it.
    """
    if _was_started():
        shown(lambda: _evaluation(workspace))
        shown(lambda: _result(workspace))


def _was_started() -> bool:
    """Whether the run in progress was started by itself, not by another run."""
    run = FlowRunContext.get()
    return run is not None and run.flow_run is not None and run.flow_run.parent_task_run_id is None


def _plan(workspace: Workspace) -> None:
    name, stages = workspace.experiment.name, plan(workspace)
    rows = [("stage", "present", "missing", "tokens", "expected", "why")]
    rows += [plan_row(each) for each in stages]
    store, *_, summary = plan_lines(stages, workspace.objects.url)
    lines = [f"## Plan of {name}", " · ".join(facts(workspace.experiment)), summary, _table(rows), store]
    description = f"What the store lacks for {name}, and why"
    create_markdown_artifact("\n\n".join(lines) + "\n", key="plan", description=description)


def _stages(stages: Sequence[Stage]) -> None:
    experiment = experiment_of_run()
    elsewhere = runtime.flow_run.parameters.get("pool") is not None
    rows = stage_rows(stages, experiment, elsewhere=elsewhere)
    create_table_artifact(
        rows, key="stages", description="What was reused from the store and what was computed"
    )


def stage_rows(
    stages: Iterable[Stage], experiment: Experiment | None, *, elsewhere: bool = False
) -> list[dict[str, Any]]:
    """Rows of the table of stages. Where a price is configured, a row for all and the columns GPUs and cost.

    elsewhere : rows were computed by other runs, whose own tables have their cost.
    """
    rows: list[dict[str, Any]] = []
    total, last = 0.0, None
    for stage in stages:
        row = {name: getattr(stage, name) for name in ("stage", "reused", "computed")}
        row |= {"seconds": round(stage.seconds, 1), "rows/s": _rate(stage)}
        if (costs := meter(experiment, stage.stage)) is not None:
            shared = elsewhere and bool(stage.computed) and _is_shared(stage.stage)
            cost = costs.cost(stage.seconds) if stage.computed and not shared else 0.0
            total, last = total + cost, costs
            row["GPUs"] = "" if shared else costs.gpus
            row[_head(costs)] = "with its shares" if shared else costs.number(cost) if costs.gpus else ""
        rows.append(row | {"state": stage.state})
    return rows if last is None else [_all(rows, total, last), *rows]


def _head(costs: Meter) -> str:
    return f"cost, {costs.currency}" if costs.currency else "cost"


def _all(rows: Sequence[dict[str, Any]], total: float, costs: Meter) -> dict[str, Any]:
    seconds = round(sum(row["seconds"] for row in rows), 1)
    sums = {"stage": "all of this run", "seconds": seconds, _head(costs): costs.number(total)}
    return dict.fromkeys(rows[0], "") | sums


def _is_shared(stage: str) -> bool:
    """Whether a pool may compute the stage: rows of the first round, before training."""
    return counts_rows(stage) and not re.search(r"held-out|, after|, round ", stage)


def _rate(stage: Stage) -> float | str:
    if not (stage.computed and stage.seconds > 0 and counts_rows(stage.stage)):
        return ""
    return float(f"{stage.computed / stage.seconds:.3g}")


def _evaluation(workspace: Workspace) -> None:
    made = results(workspace)
    result = result_of(made.evaluate)
    rows = [{"": label, "value": value} for label, value in (*summary_rows(result), *saved_rows(made))]
    create_table_artifact(rows, key="evaluation", description=str(outcome(result)))


def _result(workspace: Workspace) -> None:
    made, name = results(workspace), workspace.experiment.name
    result = result_of(made.evaluate)
    report = workspace.artifacts.read(made.report, "report.html").decode("utf-8")
    lines = [f"## {name}", str(outcome(result)), *headline_lines(made)]
    rows = [("", ""), *summary_rows(result), *saved_rows(made)]
    lines += [" · ".join(facts(workspace.experiment)), _table(rows)]
    lines += [*_figures(report), *_places(workspace, made)]
    create_markdown_artifact("\n\n".join(lines) + "\n", key="result", description=f"Result of {name}")


def _figures(report: str) -> list[str]:
    """The report's figures in its order, as many as an artifact has room for; the others are named."""
    lines, left, room = [], [], MOST_LETTERS
    for each in figures(report):
        if len(each.image) > room:
            left.append(each.title)
            continue
        room -= len(each.image)
        lines += [f"### {each.title}", each.image, each.caption]
    return [*lines, f"In the report alone, being large: {', '.join(left)}."] if left else lines


def _places(workspace: Workspace, made: Results) -> list[str]:
    """Where policy and report lie in the store, and how to get them."""
    found = {"Policy": (made.train, "policy"), "Report": (made.report, "report.html")}
    lines = ["### Policy and report, in the store"]
    for name, (manifest, file) in found.items():
        place = f"artifacts/{manifest.step}/{manifest.key}/{manifest.folder}/{file}"
        lines.append(f"{name}: `{workspace.objects.url}/{place}`")
    return [*lines, "`qrpo report EXPERIMENT --out report.html` copies the report."]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([text[0], "|---" * len(rows[0]) + "|", *text[1:]])
