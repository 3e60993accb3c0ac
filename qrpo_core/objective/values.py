"""A*-PO's target: the reward less the prompt's value, which is estimated from its references."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import finite_rewards, integers, listed, positive_beta, same_length
from qrpo_core.objective.log_partition import segment_sums
from qrpo_core.objective.quantiles import RankCounts, quantile
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.targets import CalibratedTargets


def value_targets(
    counts: RankCounts,
    rewards: ArrayLike,
    prompt: ArrayLike,
    *,
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    beta: float,
    value_beta: float,
) -> CalibratedTargets:
    """Targets R - V(x) in reward units, V(x) = value_beta log mean_i exp( R(x, y_i)/value_beta ).

    A*-PO (arXiv 2505.20686) and OAPL (arXiv 2602.19362); docs/reference/method.md, section 9. The mean is
    over all references of the prompt, so that E_ref exp( (R - V)/value_beta ) = 1 on them. With equal rewards
    the target is exactly 0; if all references fail (reward 0), V = 0. Where rewards tie nothing changes,
    since nothing is ranked; the quantiles of the result are the weak ones, for reports.

    Parameters
    ----------
    counts, rewards, prompt : rank counts, rewards and integer codes of the samples, [samples].
    reference_prompt, reference_rewards : [references].
    beta : KL strength, reward units per nat: target/beta is the log-ratio. value_beta : temperature of V, in
        reward units; towards 0 V is the best reference reward, towards infinity the mean one.

    Raises
    ------
    ObjectiveError : NaN rewards, beta or value_beta <= 0, unequal lengths, a prompt without references.
    """
    codes, values = integers(prompt, what="prompt codes"), finite_rewards(rewards)
    rows = same_length(counts=counts.n, prompt=codes, rewards=values)
    reference_codes = integers(reference_prompt, what="reference prompt codes")
    groups = group_by_prompt(reference_codes)
    given = finite_rewards(reference_rewards, what="reference rewards")
    same_length(reference_prompt=reference_codes, reference_rewards=given)
    where = groups.position(codes)
    if (where < 0).any():
        raise ObjectiveError(
            "samples of prompts without references",
            where=f"prompt codes {listed(np.unique(codes[where < 0]))}",
        )
    strength, temperature = float(positive_beta(beta)), float(positive_beta(value_beta))
    top, rest = segment_sums(groups.gather(given), groups.offsets, where, np.full(rows, temperature))
    return CalibratedTargets(
        quantile=quantile(counts.below, counts.equal, counts.n, "weak"),
        transformed=values,
        beta=np.full(rows, strength),
        log_partition=(top + temperature * rest) / strength,
        # In this order equal rewards give exactly 0.
        target=(values - top) - temperature * rest,
        tie_method="weak",
        normaliser="empirical",
        beta_max_bound=0,
    )
