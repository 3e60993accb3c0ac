"""Stage: the reference policy, as a directory that `from_pretrained` loads."""

from __future__ import annotations

from qrpo_core.pipeline import policies
from qrpo_core.pipeline.stage_names import CONVERT_MODEL
from tasks.pipeline_run import PipelineRun, Result


def prepare_policy(run: PipelineRun) -> list[Result]:
    """Convert a GGUF file once; [] for other models, which are loaded in place without a stage."""
    workspace = run.workspace
    source = policies.source_of(workspace)
    if not source.needs_conversion:
        return []
    recipe = policies.recipe(workspace, source)
    return [run.build_artifact(CONVERT_MODEL, recipe, lambda: policies.convert(workspace, source))]
