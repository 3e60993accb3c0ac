"""Losses: hand-made tables of values and gradients, laws, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.losses import (
    divide_by_length,
    dpo_loss,
    qrpo_absolute_loss,
    qrpo_residual,
    qrpo_squared_loss,
    rebel_loss,
    sft_loss,
    simpo_loss,
    tup_loss,
)

LOG1PEXP_M1 = 0.31326168751822286  # log(1 + exp(-1)) = -log sigmoid(1)
SIGMOID_M1 = 0.26894142136999512  # sigmoid(-1)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, *expected):
    torch.testing.assert_close(
        actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


# A column an example: target 3/2, log-ratio 2 (residual 1/2); target -1/4, log-ratio 0 (residual -1/4).
QRPO = {
    "ref_logprob": torch.tensor([-12.0, -3.0]).double(),
    "target": torch.tensor([1.5, -0.25]).double(),
    "beta": 0.5,
}


def test_qrpo_squared_value_and_gradient_by_hand():
    policy = vector(-10.0, -3.0)
    close(qrpo_residual(policy, **QRPO), 0.5, -0.25)
    loss = qrpo_squared_loss(policy, **QRPO)
    close(loss, 0.25, 0.0625)
    loss.sum().backward()
    close(policy.grad, -0.5, 0.25)  # -2 beta residual


def test_qrpo_absolute_value_and_gradient_by_hand():
    policy = vector(-10.0, -3.0)
    loss = qrpo_absolute_loss(policy, **QRPO)
    close(loss, 0.5, 0.25)
    loss.sum().backward()
    close(policy.grad, -0.5, 0.5)  # -beta sign(residual)
    close(qrpo_absolute_loss(policy, **QRPO), 0.5, 0.25)


def test_qrpo_with_a_beta_for_each_sample_by_hand():
    policy = vector(-10.0, -5.0)
    beta = torch.tensor([0.5, 0.125], dtype=torch.float64)
    loss = qrpo_squared_loss(policy, QRPO["ref_logprob"], QRPO["target"], beta)
    close(loss, 0.25, 0.0)  # -1/4 - 1/8 * (-2) = 0
    loss.sum().backward()
    close(policy.grad, -0.5, 0.0)


def test_qrpo_loss_is_zero_exactly_at_the_target_log_ratio():
    target, beta, ref = torch.tensor([0.3, -0.9]), 0.25, torch.tensor([-20.0, -40.0])
    policy = (ref + target / beta).requires_grad_()
    loss = qrpo_squared_loss(policy, ref, target, beta)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros(2), rtol=0, atol=1e-11)
    torch.testing.assert_close(policy.grad, torch.zeros(2), rtol=0, atol=1e-5)


def test_tup_value_and_gradient_by_hand():
    # Log odds 1/2 (1 + 1) = 1 with label 1/4, and 1/2 (-3 + 1) = -1 with label 0.
    policy = vector(-9.0, -5.0)
    known = (torch.tensor([-10.0, -2.0]).double(), torch.tensor([0.25, 0.0]).double(), torch.ones(2).double())
    loss = tup_loss(policy, *known, 0.5)
    close(loss, 1 + LOG1PEXP_M1 - 0.25, LOG1PEXP_M1)
    loss.sum().backward()
    close(policy.grad, 0.5 * (1 - SIGMOID_M1 - 0.25), 0.5 * SIGMOID_M1)  # beta (p - l)


@pytest.mark.parametrize("beta", [1e-4, 0.1, 10.0])
def test_the_gradient_of_tup_is_zero_at_its_fixed_point(beta):
    """pi/pi_ref = (l/(1 - l))^(1/beta)/Z; there the loss is the entropy of l."""
    label, log_z = torch.tensor([0.1, 0.5, 0.999]).double(), torch.tensor([3.0, -2.0, 0.5]).double()
    policy = (torch.logit(label) / beta - log_z).requires_grad_()
    loss = tup_loss(policy, torch.zeros(3).double(), label, log_z, beta)
    loss.sum().backward()
    close(policy.grad / beta, 0.0, 0.0, 0.0)
    entropy = -label * label.log() - (1 - label) * (1 - label).log()
    torch.testing.assert_close(loss.detach(), entropy, rtol=1e-9, atol=0)


def test_dpo_value_and_gradient_by_hand():
    # D_w = 1, D_l = -1, beta = 1/2: the margin is 1.
    chosen, rejected = vector(-4.0), vector(-7.0)
    loss = dpo_loss(chosen, rejected, vector(-5.0).detach(), vector(-6.0).detach(), beta=0.5)
    close(loss, LOG1PEXP_M1)
    loss.sum().backward()
    close(chosen.grad, -0.5 * SIGMOID_M1)
    close(rejected.grad, 0.5 * SIGMOID_M1)


def test_simpo_value_and_gradient_by_hand():
    # -10/5 + 12/4 = 1, less the ratio 1/2, times beta 2: the margin is 1.
    chosen, rejected = vector(-10.0), vector(-12.0)
    loss = simpo_loss(chosen, rejected, torch.tensor([5]), torch.tensor([4]), beta=2.0, gamma_beta_ratio=0.5)
    close(loss, LOG1PEXP_M1)
    loss.sum().backward()
    close(chosen.grad, -2 * SIGMOID_M1 / 5)
    close(rejected.grad, 2 * SIGMOID_M1 / 4)


def test_rebel_value_and_gradient_by_hand():
    # (1 - 1/2)/(1/8) = 4 against D_w - D_l = 2.
    chosen, rejected = vector(-4.0), vector(-7.0)
    references = (vector(-5.0).detach(), vector(-6.0).detach())
    rewards = (torch.tensor([1.0]).double(), torch.tensor([0.5]).double())
    loss = rebel_loss(chosen, rejected, *references, *rewards, beta=0.125)
    close(loss, 4.0)
    loss.sum().backward()
    close(chosen.grad, -4.0)
    close(rejected.grad, 4.0)
    swapped = rebel_loss(rejected, chosen, *references[::-1], *rewards[::-1], beta=0.125)
    close(swapped, 4.0)


def test_sft_value_and_gradient_by_hand_and_by_length():
    policy = vector(-6.0, -1.0)
    loss = divide_by_length(sft_loss(policy), torch.tensor([3, 2]))
    close(loss, 2.0, 0.5)
    loss.sum().backward()
    close(policy.grad, -1 / 3, -1 / 2)


def test_losses_of_extreme_margins_are_finite():
    far = torch.tensor([-3000.0, -10.0])
    loss = dpo_loss(far, far.flip(0), torch.zeros(2), torch.zeros(2), beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([2990.0, 0.0]))


def test_losses_give_one_value_per_example_that_does_not_depend_on_the_rest_of_the_batch():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d, e, f = (torch.randn(5, generator=generator) for _ in range(6))
    lengths = torch.arange(1, 6)
    calls = [
        lambda i: qrpo_squared_loss(a[i], b[i], c[i], 0.3),
        lambda i: qrpo_absolute_loss(a[i], b[i], c[i], 0.3),
        lambda i: tup_loss(a[i], b[i], c[i], d[i], 0.3),
        lambda i: dpo_loss(a[i], b[i], c[i], d[i], 0.3),
        lambda i: simpo_loss(a[i], b[i], lengths[i], lengths.flip(0)[i], 2.0, 0.5),
        lambda i: rebel_loss(a[i], b[i], c[i], d[i], e[i], f[i], 0.3),
        lambda i: sft_loss(a[i]),
    ]
    for call in calls:
        together = call(slice(None))
        assert together.shape == (5,)
        for i in range(5):
            torch.testing.assert_close(call(slice(i, i + 1)), together[i : i + 1])


def test_a_column_instead_of_a_vector_is_refused_and_not_broadcast():
    row, column = torch.zeros(3), torch.zeros(3, 1)
    for call in (
        lambda: qrpo_squared_loss(row, column, row, 0.1),
        lambda: qrpo_squared_loss(row, row, row, column),
        lambda: qrpo_squared_loss(row, row, torch.zeros(2), 0.1),
        lambda: tup_loss(row, row, row, column, 0.1),
        lambda: dpo_loss(row, column, row, row, 0.1),
        lambda: simpo_loss(row, row, column, row, 0.1, 0.5),
        lambda: rebel_loss(row, row, row, row, row, column, 0.1),
        lambda: sft_loss(column),
        lambda: divide_by_length(row, column),
        lambda: sft_loss(torch.tensor(1.0)),
    ):
        with pytest.raises(ObjectiveError, match="vectors"):
            call()


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_that_is_not_positive_is_refused(beta):
    row = torch.zeros(2)
    for call in (
        lambda: qrpo_squared_loss(row, row, row, beta),
        lambda: tup_loss(row, row, row, row, beta),
        lambda: dpo_loss(row, row, row, row, beta),
        lambda: simpo_loss(row, row, row + 1, row + 1, beta, 0.5),
        lambda: rebel_loss(row, row, row, row, row, row, beta),
    ):
        with pytest.raises(ObjectiveError, match="beta must be > 0"):
            call()
