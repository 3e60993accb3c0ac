"""The normalisation check of a training set: observed mean of exp(target/beta) beside the expected one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qrpo_core.objective.diagnostics import normalization_check
from qrpo_core.objective.quantiles import rank_counts_table
from qrpo_core.objective.references import group_by_prompt
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.objective.tie_aware import quantile_pieces
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective


def normalisation_facts(
    pool: Pool, targets: CalibratedTargets, kind: QuantileObjective, drawn: bool
) -> dict[str, Any]:
    """The check of the normaliser in use, also on held-out references, for the report.

    drawn : whether the training completions are draws from the reference policy. The check is a mean over
        such draws, so if they are not it uses the references.
    """
    by_length = kind.config.beta_scale == "by_length"
    if not drawn and by_length:
        return {}  # it would use the references, whose lengths the training set does not have
    used, codes, n = targets, pool.codes, pool.counts.n
    if not drawn:
        used = kind.reference_targets(pool, normaliser=targets.normaliser, tie_tolerance=1.0)
        codes = pool.reference_codes
        n = np.bincount(codes)[codes] - 1
    check = normalization_check(used, codes, kind.expected_weights(pool, used, codes, n, in_pool=True))
    found: dict[str, Any] = {
        "normalisation_mean": check.mean,
        "normalisation_expected": check.expected,
        "normalisation_standard_error": check.expected_error,
    }
    if targets.normaliser != "tie_aware":
        other = kind.targets(pool, normaliser="tie_aware", tie_tolerance=1.0)
        found["log_partition_above_tie_aware"] = float((targets.log_partition - other.log_partition).mean())
    return found if by_length else found | _held_out(pool, targets, kind)


def _held_out(pool: Pool, targets: CalibratedTargets, kind: QuantileObjective) -> dict[str, Any]:
    """The check on a random half of each prompt's references, ranked among the other half.

    The references come sorted by reward, so their place says how good they are: halves are drawn by numbers
    that know nothing of it.

    Of a normaliser that counts ties the expected value is known only where no rewards tie: prompts without
    ties are taken, if there are some.
    """
    codes, rewards = pool.reference_codes, pool.reference_rewards
    groups = group_by_prompt(codes)  # the codes are 0, 1, ... and ascending
    half = groups.counts // 2
    taken = half >= kind.fewest_references
    known = True
    if targets.normaliser in ("tie_aware", "empirical") or targets.tie_method == "randomized":
        pieces = quantile_pieces(codes, rewards)
        without_ties = taken & ~np.logical_or.reduceat(pieces.atom, pieces.offsets[:-1])
        known = bool(without_ties.any())
        taken = without_ties if known else taken
    if not taken.any():
        return {}
    noise = np.random.Philox(key=np.uint64(0)).random_raw(len(codes))
    first = np.empty(len(codes), np.bool_)
    first[np.lexsort((noise, codes))] = np.arange(len(codes)) - groups.offsets[codes] < half[codes]
    below, above = taken[codes] & first, taken[codes] & ~first
    number = np.cumsum(taken) - 1
    samples, references = number[codes[above]], number[codes[below]]
    seeds = pool.reference_seeds
    split = replace(
        pool,
        codes=samples,
        rewards=rewards[above],
        reference_codes=references,
        reference_rewards=rewards[below],
        in_pool=False,
        counts=rank_counts_table(samples, rewards[above], references, rewards[below], False),
        lengths=None,
        seeds=None if seeds is None else seeds[above],
        reference_seeds=None if seeds is None else seeds[below],
    )
    made = kind.targets(split, normaliser=targets.normaliser, tie_tolerance=1.0)
    expected = kind.expected_weights(split, made, samples, split.counts.n, in_pool=False) if known else None
    check = normalization_check(made, samples, expected)
    return {
        "held_out_mean": check.mean,
        "held_out_expected": check.expected if known else None,
        "held_out_standard_error": check.expected_error if known else check.standard_error,
        "held_out_prompts": check.prompts,
    }
