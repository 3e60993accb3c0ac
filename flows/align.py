"""`align`: precompute, train and evaluate."""

from __future__ import annotations

from prefect import flow

from flows.evaluate import evaluate
from flows.precompute import precompute
from flows.train import train
from qrpo_core.inspection.memory import check_memory
from tasks.experiment_form import FormExperiment
from tasks.receipts import counted_run
from tasks.run_names import run_name
from tasks.stages import Stage, workspace_of
from tasks.ui_artifacts import publish_plan, publish_result, publish_stages


@flow(name="align", flow_run_name=run_name)
def align(experiment: FormExperiment, pool: str | None = None) -> list[Stage]:
    """From an experiment to a trained policy and the report that shows whether it worked.

    Args:
        experiment: What to compute.
        pool: Work pool whose workers compute the missing rows; ray or ray://HOST:PORT for a Ray cluster; none
            for this run itself.
    """
    with counted_run(experiment):
        workspace = workspace_of(experiment)
        check_memory(workspace, "align", pooled=pool is not None)
        publish_plan(workspace)
        training_set = precompute(experiment, pool)
        policy = train(experiment, pool=pool, wait_for=[training_set])
        evaluated = evaluate(experiment, pool, wait_for=[policy])
        stages = [*training_set, *policy, *evaluated]
        publish_stages(stages)
        publish_result(workspace)
    return stages
