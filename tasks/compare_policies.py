"""Stage: the artifact of a comparison, and what the UI shows of it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact

from qrpo_core.evaluation.comparison_results import ComparisonResult
from qrpo_core.pipeline.comparison import Comparison, result_of
from qrpo_core.pipeline.stage_names import COMPARE_POLICIES
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.comparison_text import (
    choice_rows,
    comparison_rows,
    doubts,
    failures,
    headline,
    method_text,
    pair_lines,
)
from qrpo_core.store.manifest import Manifest
from tasks.page_links import page_address
from tasks.pipeline_run import PipelineRun, Result
from tasks.progress import publish_safely
from tasks.ui_artifacts import figure_lines, markdown_table, stored_at


def compare_policies(run: PipelineRun, comparison: Comparison, *inputs: Result) -> Manifest:
    """The artifact of the comparison, built unless the store has it, and shown in the UI."""
    run.build_artifact(COMPARE_POLICIES, comparison.recipe, comparison.build, *inputs)
    manifest = run.workspace.artifacts.get(comparison.recipe)
    publish_safely(lambda: _publish(run.workspace, manifest))
    return manifest


def publish_comparison_plan(name: str, lines: Sequence[str]) -> None:
    """Show what the comparison would train, as `qrpo compare --plan` prints it."""
    text = "\n".join([f"## Plan of the comparison of {name}", "", "```", *lines, "```"])
    description = f"Trainings and evaluations that the store lacks for the comparison of {name}"
    publish_safely(
        lambda: create_markdown_artifact(text + "\n", key="comparison-plan", description=description)
    )


def _publish(workspace: Workspace, manifest: Manifest) -> None:
    result, name = result_of(manifest), workspace.experiment.name
    page = workspace.artifacts.read(manifest, "comparison.html").decode("utf-8")
    lines = [
        f"## Comparison of {name}",
        f"[Open the page]({page_address(manifest)})",
        headline(result),
        *(f"- {each}" for each in doubts(result)),
    ]
    lines += [markdown_table(comparison_rows(result)), method_text(result), *_more(result)]
    lines += figure_lines(page)
    lines += [stored_at(workspace, manifest, "Page", "comparison.html"), "Rows: `rows.parquet` beside it."]
    description = f"Comparison of {name}: {headline(result)}"
    create_markdown_artifact("\n\n".join(lines) + "\n", key="comparison", description=description)


def _more(result: ComparisonResult) -> list[str]:
    """Failures, choices and differences, each under its heading."""
    lines = []
    if failed := failures(result):
        lines += ["### Failed", "\n".join(f"- {line}" for line in failed)]
    if result.choices:
        lines += [f"### Choice of settings\n\nChosen {result.choosing}.", markdown_table(choice_rows(result))]
    return [*lines, "### Differences", "\n".join(["```", *pair_lines(result), "```"])]
