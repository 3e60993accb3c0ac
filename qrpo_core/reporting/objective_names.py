"""The name of each objective, the kind of its items, and the unit of its loss."""

from __future__ import annotations

from dataclasses import dataclass

from qrpo_core.config.objective import ObjectiveConfig
from qrpo_core.objective_kinds import KINDS, make_objective


@dataclass(frozen=True)
class ObjectiveName:
    """short : for titles. long : spelled out. items : completions or pairs."""

    short: str
    long: str
    items: str

    def __str__(self) -> str:
        return f"{self.short} ({self.long})"


OBJECTIVE_NAMES = {
    name: ObjectiveName(kind.short, kind.long, "pairs" if kind.items == "pairs" else "completions")
    for name, kind in KINDS.items()
}


def loss_unit(objective: ObjectiveConfig) -> str:
    """The unit of the logged mean loss (docs/reference/metrics.md)."""
    unit = make_objective(objective).loss_unit
    return f"{unit} a token" if objective.loss_scale == "by_length" else unit
