"""The price of GPU hours, and its text."""

from __future__ import annotations

from dataclasses import dataclass

from qrpo_core.config import Experiment


@dataclass(frozen=True)
class Price:
    """The price of one GPU for an hour. currency : behind a cost; None for none."""

    gpu_hour: float
    currency: str | None

    @classmethod
    def of(cls, experiment: Experiment) -> Price | None:
        """The price in `service.gpu_hour_price`; None without one."""
        service = experiment.service
        return None if service.gpu_hour_price is None else cls(service.gpu_hour_price, service.currency)

    def text(self, gpu_hours: float) -> str:
        """The cost of these GPU hours: 3.20 EUR; below 0.10 with four decimals."""
        return cost_text(gpu_hours * self.gpu_hour, self.currency)


def cost_text(cost: float, currency: str | None) -> str:
    """A cost with its currency: 3.20 EUR; below 0.10 with four decimals."""
    return f"{cost_number(cost)} {currency}" if currency else cost_number(cost)


def cost_number(cost: float) -> str:
    """A cost without its currency."""
    return f"{cost:,.2f}" if cost == 0 or round(cost, 2) >= 0.1 else f"{cost:.4f}"
