"""What the UI shows of a run: the stages, and the result of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from qrpo_core.evaluation.summary import headline, summary_rows
from qrpo_core.steps.evaluation import result_of
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.recipe import Recipe
from tasks.stages import Stage


def publish_stages(stages: Sequence[Stage]) -> None:
    """A table of what each stage of this flow run reused and computed."""
    rows = [
        {
            "stage": stage.stage,
            "state": stage.state,
            "reused": stage.reused,
            "computed": stage.computed,
            "seconds": round(stage.seconds, 1),
        }
        for stage in stages
    ]
    create_table_artifact(
        rows, key="stages", description="What was reused from the store and what was computed"
    )


def publish_result(workspace: Workspace, evaluation: Recipe) -> None:
    """The evaluation's table, and the headline, as the terminal and the report spell them."""
    result = result_of(workspace.artifacts.get(evaluation))
    rows = [{"": label, "value": value} for label, value in summary_rows(result)]
    create_table_artifact(rows, key="evaluation", description=str(headline(result)))
    name = workspace.experiment.name
    create_markdown_artifact(
        f"## {name}\n\n{headline(result)}\n", key="result", description=f"Result of {name}"
    )
