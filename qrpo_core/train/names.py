"""What each objective is called wherever a person reads it, what it counts, and the unit of its loss."""

from __future__ import annotations

from dataclasses import dataclass

from qrpo_core.train.config import ObjectiveConfig, ObjectiveKind


@dataclass(frozen=True)
class ObjectiveName:
    """short : as in a title. long : spelled out. items : what it is trained on."""

    short: str
    long: str
    items: str

    def __str__(self) -> str:
        return f"{self.short} ({self.long})"


OBJECTIVE_NAMES: dict[ObjectiveKind, ObjectiveName] = {
    "qrpo": ObjectiveName("QRPO", "Quantile Reward Policy Optimization", "completions"),
    "dpo": ObjectiveName("DPO", "Direct Preference Optimization", "pairs"),
    "simpo": ObjectiveName("SimPO", "Simple Preference Optimization", "pairs"),
    "rebel": ObjectiveName("REBEL", "Regression to Relative Reward Based RL", "pairs"),
    "sft": ObjectiveName("SFT", "supervised fine-tuning", "completions"),
}


def loss_unit(objective: ObjectiveConfig) -> str:
    """The unit in which the mean loss is logged, as docs/metrics.md states it."""
    unit = {
        "qrpo": "squared reward units" if objective.loss == "mse" else "reward units",
        "rebel": "squared nats",
    }.get(objective.kind, "nats")
    return f"{unit} a token" if objective.loss_scale == "by_length" else unit
