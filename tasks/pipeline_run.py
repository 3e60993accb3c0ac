"""One flow run of the pipeline: the state that its stages share, and a record of each stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from prefect import runtime
from prefect.client.schemas.objects import State

from qrpo_core.common.errors import QRPOError
from qrpo_core.config import Experiment
from qrpo_core.inspection.memory import check_memory
from qrpo_core.pipeline.evaluation import EvaluationSteps
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe
from tasks.dispatch import Compute
from tasks.ray_runner import OnRay
from tasks.receipts import counted_run
from tasks.row_stages import in_this_run, retry_damaged, row_stage
from tasks.spending import spending
from tasks.stages import Stage, StorePath, artifact_stage, is_beside, workspace_of
from tasks.ui_artifacts import publish_plan, publish_stages
from tasks.work_pool import OnPool

#: The state of a stage's task. Passing it to the next stage draws the arrow in Prefect's graph.
Result = State[StorePath]

P = ParamSpec("P")
R = TypeVar("R")


class PipelineRun:
    """An experiment in a flow run. Entering checks it and publishes the plan; leaving publishes the stages.

    pool : the work pool whose workers compute missing rows; ray or ray://HOST:PORT for a Ray cluster; None
        for this process.
    part : the held-out prompts that are evaluated; None for all.
    stages : the finished stages, in order.
    """

    def __init__(
        self, experiment: Experiment, pool: str | None = None, part: HeldOutPart | None = None
    ) -> None:
        self.experiment, self.pool, self.part = experiment, pool, part
        self.stages: list[Stage] = []
        self._compute: Compute = in_this_run
        self._closing = ExitStack()
        self._round: Round | None = None

    def __enter__(self) -> PipelineRun:
        self._closing.enter_context(counted_run(self.experiment))
        self.workspace = workspace_of(self.experiment)
        name = runtime.flow_run.flow_name or ""
        if name != "compare" and not is_beside(self.workspace):  # a comparison checks its variants
            check_memory(self.workspace, name, pooled=self.pool is not None)
        publish_plan(self.workspace)
        if self.pool == "ray" or (self.pool or "").startswith("ray://"):
            address = None if self.pool == "ray" else self.pool
            self._compute = self._closing.enter_context(OnRay(address))
        elif self.pool is not None:
            self._compute = OnPool(self.pool)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._closing.__exit__(kind, error, trace)
        if kind is None or issubclass(kind, QRPOError):
            publish_stages(self.stages)

    def build_artifact(
        self, name: str, recipe: Recipe, build: Callable[[], Manifest], *inputs: Result
    ) -> Result:
        """The artifact of a recipe, built unless the store has it."""
        stage, state = artifact_stage(self.workspace, name, recipe, build, inputs)
        self._record(stage)
        return state

    def compute_rows(self, step: BlockStep, *inputs: Result) -> Result:
        """The rows of a step; those that the store lacks are computed."""
        stage, state = row_stage(self.workspace, step, self._compute, inputs)
        self._record(stage)
        return state

    def _record(self, stage: Stage) -> None:
        self.stages.append(stage)
        spending.stages.append(stage)

    @cached_property
    def experiment_steps(self) -> ExperimentSteps:
        """The steps of the experiment, read once a flow run; MissingError before `check_rows`."""
        return stored_steps(self.workspace).on_part(self.part)

    @property
    def round(self) -> Round:
        """The round of training that the stages work on, by default the first."""
        if self._round is None:
            self._round = self.experiment_steps.round(1)
        return self._round

    def start_round(self, number: int) -> None:
        """Work on this round of training; MissingError while the round before it has no policy."""
        self._round = self.experiment_steps.round(number)

    def settle_rewards(self) -> Round:
        """The round with its recipes named by the rewards in the store."""
        self._round = self.round.with_current_rewards()
        return self._round

    def evaluation(self) -> EvaluationSteps:
        """The steps that need the trained policy, named by the rewards in the store."""
        steps = self.experiment_steps
        return steps.after(steps.last())


def retry_on_damage(
    stages: Callable[Concatenate[PipelineRun, P], R],
) -> Callable[Concatenate[PipelineRun, P], R]:
    """Decorator: run the stages again where they meet a damaged block, which is then quarantined."""

    @wraps(stages)
    def retried(run: PipelineRun, *args: P.args, **kwargs: P.kwargs) -> R:
        before = len(run.stages)

        def reset() -> None:
            del run.stages[before:]

        return retry_damaged(lambda: stages(run, *args, **kwargs), reset)

    return retried
