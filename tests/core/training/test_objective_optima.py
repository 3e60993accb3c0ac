"""The policy that minimises an objective's expected loss, by optimisation: it is the density ratio."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qrpo_core.config import ObjectiveConfig
from qrpo_core.objective_kinds import make_objective
from qrpo_core.objective_kinds.targets import QuantileObjective

ACTIONS = 40


@pytest.mark.parametrize(
    "config",
    [
        ObjectiveConfig(beta=0.5),
        ObjectiveConfig(kind="best_of_n", candidates=4),
        ObjectiveConfig(kind="tup", beta=0.7, truncation=0.3),
        ObjectiveConfig(kind="tup", beta=2.0, truncation=0.6),
    ],
)
def test_the_minimum_of_the_expected_loss_is_the_density_ratio(config: Any) -> None:
    """A softmax over 40 actions, a uniform reference, quantiles k/40, Z the mean over them.

    What TUP truncates tends to probability 0 and never gets there; the others share what it leaves.
    """
    made = make_objective(config)
    assert isinstance(made, QuantileObjective)
    ratio = made.ratio()
    u = torch.arange(1, ACTIONS + 1).double() / ACTIONS
    score = torch.from_numpy(ratio.transform.apply(u.numpy()))
    log_z = torch.logsumexp(score / ratio.beta, 0) - math.log(ACTIONS)
    batch = {
        "target": score - ratio.beta * log_z,
        "beta": torch.full_like(u, ratio.beta),
        "ref_logprob": torch.full_like(u, -math.log(ACTIONS)),
        "log_partition": log_z.expand(ACTIONS),
        "length": torch.ones_like(u),
    }
    logits = torch.zeros(ACTIONS, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = made.losses(torch.log_softmax(logits, 0), batch).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        log_ratio = torch.log_softmax(logits, 0) + math.log(ACTIONS)
    wanted = score / ratio.beta - log_z
    kept = wanted.isfinite()
    torch.testing.assert_close(log_ratio[kept], wanted[kept], rtol=0, atol=2e-3)
    assert float(log_ratio[~kept].exp().sum()) / ACTIONS < 1e-3
