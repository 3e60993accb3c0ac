"""`sample-share` and `annotate-share`: a part of a stage's missing rows, started by `precompute`."""

from __future__ import annotations

from prefect import flow

from qrpo_core.config import Experiment
from qrpo_core.steps.shares import Share, step_of
from tasks.blocks import fill, mended
from tasks.stages import Stage, workspace_of
from tasks.tables import publish_stages


@flow(name="sample-share")
def sample_share(experiment: Experiment, share: Share) -> list[Stage]:
    """Draw completions, or compute log-probs, of a share; the engine is loaded once for all of its blocks."""
    return _compute(experiment, share)


@flow(name="annotate-share")
def annotate_share(experiment: Experiment, share: Share) -> list[Stage]:
    """Score the completions of a share."""
    return _compute(experiment, share)


def _compute(experiment: Experiment, share: Share) -> list[Stage]:
    workspace = workspace_of(experiment)
    stages = mended(lambda: [fill(workspace, step_of(workspace, share))])
    publish_stages(stages)
    return stages
