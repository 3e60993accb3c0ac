"""The tie-aware normaliser: log Z of each prompt where some rewards tie and others do not.

Source: docs/reference/method.md, section 3.7. A reward is an atom if two references of one prompt share it
anywhere in the data set. With c of a prompt's n references at an atom, F of them at or below it (as shares
c/n and F), and stretches of quantiles for all other rewards,

    Z(x) = sum over atoms of (c/n) exp(f(q)/beta) + integral of exp(f(t)/beta) over the other quantiles t

where q is the quantile of the atom under the tie method: weak F, mid F - c/(2n), strict F - c/n. Under
`randomized` an atom's quantile is uniform on [F - c/n, F], so its term is the integral too and Z is the
population's. Without atoms every tie method gives the population's Z; with atoms alone Z is the plug-in.

Z is a property of the prompt, so all its n references count, also for a sample that is one of them and is
ranked among the n - 1 others: with itself left out of Z as well, the estimate would be noisier, and at a rare
atom (one success of n) there would be nothing left to estimate from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.checks import FloatArray, IntArray, positive_beta
from qrpo_core.objective.log_partition import segment_chunks
from qrpo_core.objective.quantiles import TIE_METHODS, TieMethod
from qrpo_core.objective.references import Groups, known_positions, sort_references
from qrpo_core.objective.transforms import RewardTransform


@dataclass(frozen=True, eq=False)
class Pieces:
    """Each prompt's quantiles (0, 1) in pieces, ascending: its atoms, and the stretches between them.

    groups : the references by prompt. offsets [prompts + 1] : prompt p has the pieces
    offsets[p] : offsets[p + 1]. below, upto [pieces] : references of the prompt below the piece, and up to
    its end. atom [pieces] : whether it is an atom.
    """

    groups: Groups
    offsets: IntArray
    below: IntArray
    upto: IntArray
    atom: NDArray[np.bool_]


def quantile_pieces(
    reference_prompt: ArrayLike, reference_rewards: ArrayLike, atoms: ArrayLike | None = None
) -> Pieces:
    """The pieces of all prompts of a data set; both columns [references].

    atoms : the rewards that are atoms; None takes those that two references of one prompt share.
    """
    references = sort_references(reference_prompt, reference_rewards)
    ends, rewards = references.groups.offsets, references.rewards
    first_row = np.zeros(len(rewards), dtype=bool)  # of a prompt
    first_row[ends[:-1]] = True
    new = first_row.copy()  # the first reference of each distinct reward
    new[1:] |= rewards[1:] != rewards[:-1]
    start = np.flatnonzero(new)
    if atoms is None:
        atoms = np.unique(rewards[start][np.diff(np.append(start, len(rewards))) > 1])
    atom = np.isin(rewards[start], np.asarray(atoms, dtype=np.float64))
    # Stretches side by side are one stretch: one integral, and no rounding at the seams.
    joined = np.zeros(len(start), dtype=bool)
    joined[1:] = ~atom[1:] & ~atom[:-1] & ~first_row[start[1:]]
    start, atom = start[~joined], atom[~joined]
    offsets = np.searchsorted(start, ends)
    base = np.repeat(ends[:-1], np.diff(offsets))
    upto = np.append(start[1:], len(rewards)) - base
    return Pieces(references.groups, offsets, start - base, upto, atom)


def tie_aware_log_partition(
    transform: RewardTransform,
    beta: float,
    reference_prompt: ArrayLike,
    reference_rewards: ArrayLike,
    *,
    tie_method: TieMethod = "weak",
    atoms: ArrayLike | None = None,
) -> FloatArray:
    """log Z of each prompt in nats, [prompts] in ascending order of their codes.

    Parameters
    ----------
    transform : f; with parameters that vary by prompt, codes are indices into them. Where it is infinite at
        an atom, it is clamped as for n references (`RewardTransform.apply`).
    beta : KL strength, > 0.
    reference_prompt, reference_rewards : [references].
    tie_method : weak, mid, strict or randomized.
    atoms : the rewards that are atoms; None takes those that two references of one prompt share.

    Raises
    ------
    ObjectiveError : NaN or infinite rewards, no rows, beta <= 0, unknown tie method.
    """
    pieces = quantile_pieces(reference_prompt, reference_rewards, atoms)
    counts = pieces.groups.counts
    betas = np.full(len(counts), float(positive_beta(beta)))
    top, rest = tie_aware_sums(pieces, transform, betas, tie_method, counts, pieces.groups.codes)
    return np.asarray(top / betas + rest, dtype=np.float64)


def tie_aware_sums(
    pieces: Pieces,
    transform: RewardTransform,
    beta: FloatArray,
    tie_method: TieMethod,
    n: IntArray,
    prompt: IntArray,
) -> tuple[FloatArray, FloatArray]:
    """log Z of each sample as (max, rest) with log Z = max/beta + rest; all columns [samples].

    n : the references that each sample was ranked among. f is clamped as in its own rank, so that where all
    rewards are equal the target is exactly 0.
    """
    if tie_method not in TIE_METHODS:
        raise ObjectiveError(f"unknown tie method {tie_method!r}", remedy=f"one of {', '.join(TIE_METHODS)}")
    where = known_positions(pieces.groups, prompt)
    rows, inverse = distinct(where, beta, n)  # one sum for each prompt, beta and n
    segment, betas, ranked = where[rows], beta[rows], n[rows]
    top, rest = np.empty(len(rows)), np.empty(len(rows))
    for part, index, first, size in segment_chunks(pieces.offsets, segment):
        each = np.repeat(segment[part], size)
        beta_of = np.repeat(betas[part], size)
        values = _piece_values(
            pieces, index, each, transform, beta_of, tie_method, np.repeat(ranked[part], size)
        )
        weight = (pieces.upto[index] - pieces.below[index]) / pieces.groups.counts[each]
        top[part] = np.maximum.reduceat(values, first)
        scaled = (values - np.repeat(top[part], size)) / beta_of
        # The weights of a prompt add up to 1: expm1 and log1p keep the digits as log Z tends to 0.
        rest[part] = np.log1p(np.add.reduceat(weight * np.expm1(scaled), first))
    return top[inverse], rest[inverse]


def _piece_values(
    pieces: Pieces,
    index: IntArray,
    prompt: IntArray,
    transform: RewardTransform,
    beta: FloatArray,
    tie_method: TieMethod,
    n: IntArray,
) -> FloatArray:
    """beta log of the mean of exp(f/beta) over each piece, in reward units; at an atom it is f.

    index, prompt : of the pieces and of their prompts in `pieces`. beta, n : of the samples.
    """
    below, upto, size = pieces.below[index], pieces.upto[index], pieces.groups.counts[prompt]
    codes = pieces.groups.codes[prompt]
    atom = pieces.atom[index] & (tie_method != "randomized")
    out = np.empty(len(index))
    if atom.any():
        first, last = below[atom], upto[atom]
        hits = {"weak": last, "mid": 0.5 * (first + last), "strict": first}[tie_method]
        here, q = transform.at(codes[atom]), hits / size[atom]
        values = here.apply(q)
        if not np.isfinite(values).all():
            values = np.where(np.isfinite(values), values, here.apply(q, n[atom]))
        out[atom] = values
    stretch = np.flatnonzero(~atom)
    if len(stretch):
        columns = [column[stretch] for column in (below, upto, size, codes)]
        rows, inverse = distinct(beta[stretch], *(columns if transform.varies_by_prompt else columns[:3]))
        one = stretch[rows]
        low, high = below[one] / size[one], upto[one] / size[one]
        mean = transform.at(codes[one]).log_mean(low, high, beta[one])
        out[stretch] = (beta[one] * mean)[inverse]
    return out


def distinct(*columns: NDArray[np.float64] | NDArray[np.int64]) -> tuple[IntArray, IntArray]:
    """(rows, inverse): one row of each distinct combination of the columns; combination[inverse] is all."""
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, code = np.unique(column, return_inverse=True)
        _, key = np.unique(key * len(values) + code, return_inverse=True)
    rows = np.empty(int(key.max(initial=-1)) + 1, dtype=np.int64)
    rows[key] = np.arange(len(key))
    return rows, key
