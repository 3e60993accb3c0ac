"""Stage: fit the policy to the targets of the training set."""

from __future__ import annotations

from qrpo_core.pipeline import training
from qrpo_core.pipeline.stage_names import TRAIN_POLICY
from qrpo_core.store.artifacts import Manifest
from qrpo_core.training.stopping import request_stop
from tasks.compute_quantiles import refuse_without_signal
from tasks.pipeline_run import PipelineRun, Result
from tasks.progress import stage_progress
from tasks.spending import spending


def train_policy(run: PipelineRun, *training_set: Result) -> Result:
    """Train and save the policy of the round; an interrupted training resumes from its last checkpoint.

    training_set : the result of this flow run; none where another flow run made it.
    """
    workspace, round_ = run.workspace, run.settle_rewards()
    refuse_without_signal(round_)
    name = round_.label(TRAIN_POLICY)

    def build() -> Manifest:
        spending.check(name)
        data = workspace.artifacts.get(round_.training_set_recipe)
        examples = training.example_count(workspace, data)
        steps = training.optimiser_steps(workspace.experiment.training, examples)
        with stage_progress(name, steps, "steps") as advance:
            done = 0

            def on_step(step: int, total: int, logs: dict[str, float]) -> None:
                nonlocal done
                advance(step - done)
                done = step
                if spending.over:
                    request_stop(training.work_directory(round_.train_recipe), spending.why)

            return training.build(workspace, round_.train_recipe, data, round_.start, on_step)

    return run.build_artifact(name, round_.train_recipe, build, *training_set)
