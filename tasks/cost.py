"""What a stage costs: its seconds times its GPUs, at the price that an experiment names.

A GPU is paid for as long as a stage holds it, at work or not: loading a model counts. Only experiments with
`service.gpu_hour_price` have costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect import runtime

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError
from qrpo_core.rewards.config import RewardConfig, has_kind


@dataclass(frozen=True)
class Meter:
    """GPUs that a stage holds, and what one of them costs an hour."""

    gpus: int
    price: float
    currency: str | None

    def cost(self, seconds: float) -> float:
        """What so many seconds of the stage cost, in the currency."""
        return self.gpus * seconds / 3600 * self.price

    def text(self, cost: float) -> str:
        """3.20 EUR; less than a tenth to four decimals."""
        return f"{self.number(cost)} {self.currency}" if self.currency else self.number(cost)

    def number(self, cost: float) -> str:
        """The same without the currency."""
        return f"{cost:,.2f}" if cost == 0 or round(cost, 2) >= 0.1 else f"{cost:.4f}"


def experiment_of_run() -> Experiment | None:
    """The parameter `experiment` of the flow run in progress, as every flow here has it; None outside one."""
    found = runtime.flow_run.parameters.get("experiment")
    return found if isinstance(found, Experiment) else None


def meter(experiment: Experiment | None, stage: str, machines: int = 1) -> Meter | None:
    """What the stage with this label costs; None without a price. machines : that work on it at once."""
    service = None if experiment is None else experiment.service
    if experiment is None or service is None or service.gpu_hour_price is None:
        return None
    return Meter(machines * gpus(experiment, stage), service.gpu_hour_price, service.currency)


def gpus(experiment: Experiment, stage: str) -> int:
    """GPUs that a stage holds on its machine: 0 for what computes no model of ours.

    stage : its label. Training has one a process; log-probs and reward models one; sampling one with
        transformers, tensor_parallel_size x engines with vllm, none with an endpoint (whoever runs it pays).
    """
    kind = stage.split(" ")[0].rstrip(",")
    if kind == "judge":
        judge = experiment.evaluation.judges.get(stage.removeprefix("judge ").rpartition(" held-out, ")[0])
        return 0 if judge is None else _scoring(judge)
    if "log-probs" in stage:
        return 1
    return {
        "sample": _drawing(experiment),
        "copy": max(1, _drawing(experiment)),
        "parity": max(1, _drawing(experiment)),
        "score": _scoring(experiment.reward),
        "train": experiment.training.processes,
    }.get(kind, 0)


def counts_rows(stage: str) -> bool:
    """Whether the stage with this label computes rows, not one artifact."""
    return stage.split(" ")[0].rstrip(",") in ("sample", "score", "judge") or "log-probs" in stage


def _scoring(reward: RewardConfig) -> int:
    return int(has_kind(reward, "model"))


def _drawing(experiment: Experiment) -> int:
    engine = experiment.sampling.engine
    return _vllm(experiment) if engine == "vllm" else int(engine == "transformers")


def _vllm(experiment: Experiment) -> int:
    """GPUs of all engines; where none is visible, those that the experiment names."""
    from qrpo_core.engines.vllm_setup import gpu_groups, visible_gpus

    config = experiment.vllm
    named = (config.engines or 1) * config.tensor_parallel_size
    try:
        return sum(map(len, gpu_groups(config, visible_gpus()))) or named
    except ConfigError:  # told where the engine is started
        return named
