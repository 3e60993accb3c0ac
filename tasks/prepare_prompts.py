"""Stages: read the prompts, and check that the policy and the rewards can use them."""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.pipeline import prompts, usable_rows
from qrpo_core.pipeline.experiment_steps import stored_reference
from qrpo_core.pipeline.stage_names import CHECK_ROWS, PREPARE_PROMPTS
from qrpo_core.store.artifacts import Manifest
from tasks.pipeline_run import PipelineRun, Result
from tasks.progress import stage_progress


def prepare_prompts(run: PipelineRun) -> Result:
    """Read, merge and split the prompts of the data set, with any completions in it."""
    recipe = prompts.recipe(run.workspace)
    return run.build_artifact(PREPARE_PROMPTS, recipe, lambda: prompts.build(run.workspace, recipe))


def check_rows(run: PipelineRun, prepared: Result, policy: Sequence[Result]) -> Result:
    """Check every prompt and completion against tokenizer, lengths and graders; record the rows left out."""
    workspace = run.workspace
    prompts_recipe, reference = prompts.recipe(workspace), stored_reference(workspace)

    def build() -> Manifest:
        tables = prompts.stored(workspace, workspace.artifacts.get(prompts_recipe))
        with stage_progress(CHECK_ROWS, len(tables.prompts), "prompts") as advance:
            return usable_rows.build(workspace, prompts_recipe, tables, reference, advance)

    recipe = usable_rows.recipe(workspace, prompts_recipe, reference)
    return run.build_artifact(CHECK_ROWS, recipe, build, prepared, *policy)
