"""The artifacts of a run in the UI besides its progress: the plan, the stages, the result with its figures.

An error here is a warning and never fails the run (`tasks.progress.publish_safely`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from prefect import runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from qrpo_core.config import Experiment
from qrpo_core.inspection.expected import with_expected
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.plan_text import COLUMNS, plan_row, total_lines
from qrpo_core.inspection.pool_report import found_report, page_path, plan_line
from qrpo_core.inspection.price import Price, cost_number
from qrpo_core.inspection.result import Results, headline_lines, results, saved_rows
from qrpo_core.inspection.stage_work import counts_rows
from qrpo_core.pipeline.evaluation import result_of
from qrpo_core.pipeline.pool_report import stored_report
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.reporting.pool_text import headline, headlines, judge_rows, more_rows, reward_rows
from qrpo_core.reporting.summary import outcome, summary_rows
from qrpo_core.store.manifest import Manifest
from tasks.cost import Meter, experiment_of_run, meter
from tasks.page_links import page_address
from tasks.progress import publish_safely
from tasks.report_examples import example_lines
from tasks.report_figures import figures
from tasks.run_names import facts
from tasks.spending import is_top_level
from tasks.stages import Stage

#: Size limit of an artifact's figures, since the server keeps every artifact of every run.
MAX_FIGURE_CHARACTERS = 400_000


def publish_plan(workspace: Workspace) -> None:
    """Publish the output of `qrpo plan`: what the run will compute, and why.

    Only the outermost run does: the plan of `align` includes its subflows.
    """
    if is_top_level():
        publish_safely(lambda: _plan(workspace))


def publish_stages(stages: Sequence[Stage]) -> None:
    """Publish a table of the stages: rows reused and computed, rate, cost."""
    publish_safely(lambda: _stages(stages))


def publish_result(workspace: Workspace) -> None:
    """Publish the evaluation's table and the result: headlines, figures, paths of policy and report.

    Only the outermost run does: `align`, and not the `evaluate` in it.
    """
    if is_top_level():
        publish_safely(lambda: _evaluation(workspace))
        publish_safely(lambda: _result(workspace))


def publish_pool_report(workspace: Workspace) -> None:
    """Publish the pool report: its text with its figures."""
    publish_safely(lambda: _pool_report(workspace))


def _plan(workspace: Workspace) -> None:
    name, stages = workspace.experiment.name, with_expected(workspace, plan(workspace))
    rows = [COLUMNS, *map(plan_row, stages)]
    lines = [
        f"## Plan of {name}",
        " · ".join(facts(workspace.experiment)),
        "  \n".join(total_lines(stages, Price.of(workspace.experiment), workspace.objects.free_bytes())),
        markdown_table(rows),
        plan_line(workspace),
        f"Store: {workspace.objects.url}",
    ]
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
    """Rows of the table of stages. With a price, a total row and the columns GPUs and cost.

    elsewhere : other runs computed rows, and their own tables have the cost.
    """
    rows: list[dict[str, Any]] = []
    total, last = 0.0, None
    for stage in stages:
        row = {name: getattr(stage, name) for name in ("stage", "reused", "computed")}
        row |= {"seconds": round(stage.seconds, 1), "rows/s": _rate(stage)}
        if (costs := meter(experiment, stage.stage)) is not None:
            shared = elsewhere and bool(stage.computed) and _runs_on_pool(stage.stage)
            cost = costs.cost(stage.seconds) if stage.computed and not shared else 0.0
            total, last = total + cost, costs
            row["GPUs"] = "" if shared else costs.gpus
            row[_cost_column(costs)] = (
                "with its shards" if shared else cost_number(cost) if costs.gpus else ""
            )
        rows.append(row | {"state": stage.state})
    return rows if last is None else [_total_row(rows, total, last), *rows]


def _cost_column(costs: Meter) -> str:
    return f"cost, {costs.currency}" if costs.currency else "cost"


def _total_row(rows: Sequence[dict[str, Any]], total: float, costs: Meter) -> dict[str, Any]:
    seconds = round(sum(row["seconds"] for row in rows), 1)
    sums = {"stage": "all of this run", "seconds": seconds, _cost_column(costs): cost_number(total)}
    return dict.fromkeys(rows[0], "") | sums


def _runs_on_pool(stage: str) -> bool:
    """Whether a pool may compute the stage: rows of the first round, before training."""
    return counts_rows(stage) and not re.search(r"held-out|benchmark|, after|, round ", stage)


def _rate(stage: Stage) -> float | str:
    if not (stage.computed and stage.seconds > 0 and counts_rows(stage.stage)):
        return ""
    return float(f"{stage.computed / stage.seconds:.3g}")


def _evaluation(workspace: Workspace) -> None:
    made = results(workspace)
    result = result_of(made.evaluate)
    found = (*summary_rows(result), *benchmark_rows(made.benchmarks), *saved_rows(made))
    rows = [{"": label, "value": value} for label, value in found]
    create_table_artifact(rows, key="evaluation", description=str(outcome(result)))


def _result(workspace: Workspace) -> None:
    made, name = results(workspace), workspace.experiment.name
    result = result_of(made.evaluate)
    report = workspace.artifacts.read(made.report, "report.html").decode("utf-8")
    lines = [f"## {name}", f"[Open the report]({page_address(made.report)})"]
    lines += [str(outcome(result)), *headline_lines(made)]
    rows = [("", ""), *summary_rows(result), *benchmark_rows(made.benchmarks), *saved_rows(made)]
    lines += [" · ".join(facts(workspace.experiment)), markdown_table(rows)]
    lines += [*figure_lines(report), *example_lines(workspace, made), *_locations(workspace, made)]
    description = f"{name}: {outcome(result).sentence}"
    create_markdown_artifact("\n\n".join(lines) + "\n", key="result", description=description)


def _pool_report(workspace: Workspace) -> None:
    made, name = found_report(workspace), workspace.experiment.name
    assert made is not None  # the run has just made it
    report, page = stored_report(made), page_path(workspace, made).read_text("utf-8")
    lines = [
        f"## Pool of {name}",
        f"[Open the page]({page_address(made)})",
        headline(report),
        *map(str, headlines(report)),
        *figure_lines(page),
    ]
    lines += [markdown_table([("pool", ""), *reward_rows(report)]), markdown_table(more_rows(report))]
    lines += [markdown_table(judge_rows(report))] if report.judges else []
    create_markdown_artifact("\n\n".join(lines) + "\n", key="pool-report", description=headline(report))


def figure_lines(report: str) -> list[str]:
    """The report's figures in order, up to the size limit; larger ones are named only."""
    lines, left, room = [], [], MAX_FIGURE_CHARACTERS
    for each in figures(report):
        if len(each.image) > room:
            left.append(each.title)
            continue
        room -= len(each.image)
        lines += [f"### {each.title}", each.image, each.caption]
    return [*lines, f"Too large to show here, see the report: {', '.join(left)}."] if left else lines


def _locations(workspace: Workspace, made: Results) -> list[str]:
    """Paths of policy and report in the store, and the commands that show this run again."""
    lines = ["### Policy and report, in the store"]
    lines += [stored_at(workspace, made.train, "Policy", "policy")]
    lines += [stored_at(workspace, made.report, "Report", "report.html")]
    named = f"{made.report.key[:8]} --store {workspace.objects.url}"
    return [
        *lines,
        f"`qrpo show {named}` and `qrpo config {named}` say more, `qrpo report` copies the report.",
    ]


def stored_at(workspace: Workspace, manifest: Manifest, what: str, file: str) -> str:
    """`what: address in the store` of a file or folder of an artifact."""
    place = f"artifacts/{manifest.step}/{manifest.key}/{manifest.folder}/{file}"
    return f"{what}: `{workspace.objects.url}/{place}`"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([text[0], "|---" * len(rows[0]) + "|", *text[1:]])
