"""Losses: functions of tensors that return one value per example.

Log-probs are sums over completion tokens in nats ([batch], float32 at least); beta in reward units per nat.
Equations: docs/reference/method.md, sections 1 (QRPO), 6 (baselines) and 9 (TUP, A*-PO). QRPO: Matrenok,
Moalla, Gulcehre 2025, arXiv 2507.08068. Gradients flow wherever an argument requires them: pass reference
log-probs and targets as constants.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qrpo_core.common.errors import ObjectiveError


def qrpo_residual(
    policy_logprob: Tensor, ref_logprob: Tensor, target: Tensor, beta: float | Tensor
) -> Tensor:
    """target - beta log(pi/pi_ref), the residual of QRPO in reward units.

    Source: docs/reference/method.md, section 1.

    Parameters
    ----------
    policy_logprob, ref_logprob : [batch] log pi(y|x), log pi_ref(y|x).
    target : [batch] calibrated target f(R_q) - beta log Z, reward units.
    beta : a number, or [batch] where beta differs by sample (beta/length).

    Returns
    -------
    [batch].
    """
    _check_vectors(policy_logprob=policy_logprob, ref_logprob=ref_logprob, target=target, beta=beta)
    return target - beta * (policy_logprob - ref_logprob)


def qrpo_squared_loss(
    policy_logprob: Tensor, ref_logprob: Tensor, target: Tensor, beta: float | Tensor
) -> Tensor:
    """( f(R_q) - beta log Z - beta log(pi/pi_ref) )^2, the paper's loss (mse). Arguments: `qrpo_residual`."""
    return qrpo_residual(policy_logprob, ref_logprob, target, beta).square()


def qrpo_absolute_loss(
    policy_logprob: Tensor, ref_logprob: Tensor, target: Tensor, beta: float | Tensor
) -> Tensor:
    """| f(R_q) - beta log Z - beta log(pi/pi_ref) | (mae). Arguments: `qrpo_residual`."""
    return qrpo_residual(policy_logprob, ref_logprob, target, beta).abs()


def tup_loss(
    policy_logprob: Tensor,
    ref_logprob: Tensor,
    label: Tensor,
    log_partition: Tensor,
    beta: float | Tensor,
) -> Tensor:
    """-l log p - (1 - l) log(1 - p) with p = sigmoid( beta log(pi/pi_ref) + beta log Z ): TUP.

    Source: arXiv 2608.19748; docs/reference/method.md, section 9. The derivative in log pi is beta (p - l),
    so it is least where pi/pi_ref = (l/(1 - l))^(1/beta)/Z, with the entropy of l; for l = 0 it falls without
    end.

    Parameters
    ----------
    policy_logprob, ref_logprob : [batch] log pi(y|x), log pi_ref(y|x).
    label : [batch] max(R_q - lambda, 0), in [0, 1).
    log_partition : [batch] log Z of ( l/(1 - l) )^(1/beta), nats.
    beta : a number, or [batch].

    Returns
    -------
    [batch], nats.
    """
    _check_vectors(
        policy_logprob=policy_logprob,
        ref_logprob=ref_logprob,
        label=label,
        log_partition=log_partition,
        beta=beta,
    )
    log_odds = beta * (policy_logprob - ref_logprob + log_partition)
    return F.softplus(log_odds) - label * log_odds


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    """-log sigmoid( beta (D_w - D_l) ), D = log pi - log pi_ref (Rafailov et al. 2023, Eq. 7).

    All tensors [batch] log-probs of the preferred (chosen) and the other (rejected) completion; returns
    [batch].
    """
    _check_vectors(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    _check_beta(beta)
    return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)))


def simpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma_beta_ratio: float,
) -> Tensor:
    """-log sigmoid( beta (log pi_w/|w| - log pi_l/|l|) - gamma ), gamma = beta gamma_beta_ratio.

    Meng et al. 2024 (SimPO), Eq. 6. Needs no reference model.

    Parameters
    ----------
    policy_chosen, policy_rejected : [batch] log-prob sums.
    chosen_lengths, rejected_lengths : [batch] completion tokens in those sums, >= 1.
    beta, gamma_beta_ratio : numbers; beta > 0.

    Returns
    -------
    [batch].
    """
    _check_vectors(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    _check_beta(beta)
    margin = policy_chosen / chosen_lengths - policy_rejected / rejected_lengths
    return -F.logsigmoid(beta * (margin - gamma_beta_ratio))


def rebel_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    beta: float,
) -> Tensor:
    """( (r_w - r_l)/beta - (D_w - D_l) )^2 with raw rewards (Gao et al. 2024, REBEL, Algorithm 1).

    All tensors [batch]; returns [batch], in nats squared. With eta = 1/beta it is eta^2
    times the square written there. Swapping chosen and rejected does not change it.
    """
    _check_vectors(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
    )
    _check_beta(beta)
    log_ratio_difference = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return ((chosen_rewards - rejected_rewards) / beta - log_ratio_difference).square()


def sft_loss(policy_logprob: Tensor) -> Tensor:
    """-log pi(y|x) of the chosen (or correct) completion, [batch], nats per completion.

    `divide_by_length` makes it nats per token.
    """
    _check_vectors(policy_logprob=policy_logprob)
    return -policy_logprob


def divide_by_length(loss: Tensor, lengths: Tensor) -> Tensor:
    """loss/|y|, a loss a token (docs/reference/method.md, section 5). Both [batch]."""
    _check_vectors(loss=loss, lengths=lengths)
    return loss / lengths


def _check_vectors(**tensors: Tensor | float) -> None:
    """Raise ObjectiveError unless all are [batch]: a [batch, 1] operand would broadcast to [batch, batch]."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}
    if "beta" in tensors:
        _check_beta(tensors["beta"])
        if shapes.get("beta") == ():
            del shapes["beta"]
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ObjectiveError(f"losses take vectors [batch] of one length, got {found}")


def _check_beta(beta: float | Tensor) -> None:
    # A tensor's values are not read here: on a GPU that would wait for the device at every step.
    if not isinstance(beta, Tensor) and not beta > 0:
        raise ObjectiveError(f"beta must be > 0, got {beta}")
