"""The work behind a stage's name: what kind it is, with which settings, and the GPUs that it holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qrpo_core.config import Experiment
from qrpo_core.config.rewards import RewardConfig, has_kind
from qrpo_core.engines.kinds import TRAINERS, kind_of
from qrpo_core.pipeline.row_recipes import LogprobSettings
from qrpo_core.pipeline.stage_names import SAMPLE_COMPLETIONS, benchmark_in

Kind = Literal["sample", "reward", "log-probs", "train", "parity", "artifact"]

_KINDS: dict[str, Kind] = {
    "sample": "sample",
    "annotate": "reward",
    "judge": "reward",
    "train": "train",
    "engine": "parity",
    "parity": "parity",
}


@dataclass(frozen=True)
class StageWork:
    """What a stage computes.

    experiment : that of the benchmark, for a benchmark's rows.
    scorer : of a stage of rewards, else None.
    precision : of log-probs and of training (`LogprobSettings`), else "".
    """

    kind: Kind
    experiment: Experiment
    scorer: RewardConfig | None = None
    precision: str = ""

    @property
    def gpus(self) -> int:
        """GPUs that the stage holds on its machine; 0 where it runs no model.

        Training holds one for each process, log-probs and reward models one, sampling one with transformers,
        tensor_parallel_size x engines with vllm, and none with an endpoint.
        """
        match self.kind:
            case "sample":
                return kind_of(self.experiment).gpus(self.experiment)
            case "parity":
                return max(1, kind_of(self.experiment).gpus(self.experiment))
            case "reward":
                return int(self.scorer is not None and has_kind(self.scorer, "model"))
            case "log-probs":
                return 1
            case "train":
                return self.experiment.training.processes
        return 0


def work_of(experiment: Experiment, stage: str) -> StageWork:
    """The work of the stage with this label."""
    if (name := benchmark_in(stage)) is not None:
        experiment = experiment.of_benchmark(name)
    experiment = as_drawn(experiment, stage)
    kl = stage.endswith(", after")
    if "log-probs" in stage:
        settings = LogprobSettings.of_kl if kl else LogprobSettings.of_training
        return StageWork("log-probs", experiment, precision=settings(experiment).precision)
    first = stage.split(" ")[0].rstrip(",")
    kind = _KINDS.get(first, "artifact")
    if kind != "reward":
        precision = experiment.training.arithmetic if kind == "train" else ""
        return StageWork(kind, experiment, precision=precision)
    if first == "annotate":
        return StageWork(kind, experiment, experiment.reward)
    judge = re.sub(" held-out, (before|after)$|, pool$", "", stage.removeprefix("judge "))
    return StageWork(kind, experiment, experiment.evaluation.judges.get(judge))


def as_drawn(experiment: Experiment, stage: str) -> Experiment:
    """The experiment with the engine that draws in this stage: an endpoint has no policy that was trained."""
    trained = stage.startswith(SAMPLE_COMPLETIONS) or (
        stage.startswith("sample ") and stage.endswith(", after")
    )
    if not (trained and kind_of(experiment).reference_only):
        return experiment
    sampling = experiment.sampling.model_copy(update={"engine": TRAINERS.name})
    return experiment.model_copy(update={"sampling": sampling})


def counts_rows(stage: str) -> bool:
    """Whether the stage with this label computes rows instead of one artifact."""
    return stage.split(" ")[0].rstrip(",") in ("sample", "annotate", "judge") or "log-probs" in stage
