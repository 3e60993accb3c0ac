"""The cost of a stage: seconds x GPUs x price per GPU hour.

A stage pays for a GPU as long as it holds it, model loading included. Only experiments with
`service.gpu_hour_price` have costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect import runtime

from qrpo_core.config import Experiment
from qrpo_core.inspection.price import cost_text
from qrpo_core.inspection.stage_work import work_of


@dataclass(frozen=True)
class Meter:
    """The GPUs that a stage holds, and the price of one GPU hour."""

    gpus: int
    price: float
    currency: str | None

    def cost(self, seconds: float) -> float:
        """The cost of this many seconds of the stage, in the currency."""
        return self.gpus * seconds / 3600 * self.price

    def text(self, cost: float) -> str:
        """A cost with its currency: 3.20 EUR; below 0.10 with four decimals."""
        return cost_text(cost, self.currency)


def experiment_of_run() -> Experiment | None:
    """The parameter `experiment` of the current flow run; None outside a flow run."""
    found = runtime.flow_run.parameters.get("experiment")
    return found if isinstance(found, Experiment) else None


def meter(experiment: Experiment | None, stage: str, machines: int = 1) -> Meter | None:
    """The meter of the stage with this label; None without a price. machines : number that compute it."""
    service = None if experiment is None else experiment.service
    if experiment is None or service is None or service.gpu_hour_price is None:
        return None
    return Meter(machines * work_of(experiment, stage).gpus, service.gpu_hour_price, service.currency)
