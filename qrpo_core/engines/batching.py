"""Which requests are decoded together, and in which shape.

The law: a row's tokens depend on its own request alone. Floating-point results of matrix products depend on
shapes, so the shape in which a row is computed is a function of that row alone: its prompt is read by itself,
unpadded, and it is decoded in a table whose number of slots and positions follows from its own length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qrpo_core.engines.base import SampleRequest, SamplingParams, ScoreRequest
from qrpo_core.errors import EngineError

#: Positions of the smallest table; larger ones are 2^k and 1.5 * 2^k. Every slot is masked to what it holds.
_SMALLEST = 96
#: Slots of a table; rows of more than 512 positions get fewer, to keep slots * positions near 32,768.
_SLOTS, _FEWEST_SLOTS, _CELLS = 64, 8, 32768


@dataclass(frozen=True)
class Table:
    """Rows decoded together: `slots` at a time, each in `positions` places of the key-value cache.

    rows : indices into the requests; equal prompts are neighbours, so each prompt is read once.
    """

    slots: int
    positions: int
    rows: tuple[int, ...]


def positions_for(length: int) -> int:
    """Places of the cache for a row of `length` tokens, prompt and limit of new ones: at most half more."""
    size = _SMALLEST
    while size < length:
        size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
    return size


def slots_for(positions: int) -> int:
    """Slots of a table: 64, and fewer (8 at least) for long rows, which would take too much memory."""
    return max(_FEWEST_SLOTS, min(_SLOTS, _CELLS // positions // 8 * 8))


def tables(
    requests: Sequence[SampleRequest], max_new_tokens: int, *, slots: int | None = None
) -> list[Table]:
    """Deal the requests out to tables.

    slots : rows at a time where exactness is not to be had (accelerators): one table for all. None: shapes
        follow from each row's own length.
    """
    lengths = [len(request.prompt_token_ids) + max_new_tokens for request in requests]
    if not lengths:
        return []
    order = sorted(range(len(requests)), key=lambda row: (lengths[row], requests[row].prompt_token_ids, row))
    if slots is not None:
        return [Table(slots, positions_for(max(lengths)), tuple(order))]
    sizes: dict[int, list[int]] = {}
    for row in order:
        sizes.setdefault(positions_for(lengths[row]), []).append(row)
    return [Table(slots_for(size), size, tuple(rows)) for size, rows in sizes.items()]


def check_samples(
    requests: Sequence[SampleRequest], params: SamplingParams, *, vocab_size: int, max_length: int | None
) -> None:
    """Refuse what cannot be drawn as asked; nothing is cut to fit. Raises EngineError."""
    if not params.temperature > 0 or not 0 < params.top_p <= 1 or params.max_new_tokens < 1:
        raise EngineError(
            f"temperature {params.temperature} must be > 0, top_p {params.top_p} in (0, 1], "
            f"max_new_tokens {params.max_new_tokens} >= 1"
        )
    checked: set[tuple[int, ...]] = set()
    for request in requests:
        if request.prompt_token_ids in checked:
            continue
        where = f"prompt {request.prompt_id}"
        _check_tokens(request.prompt_token_ids, vocab_size, where)
        length = len(request.prompt_token_ids)
        if max_length is not None and length + params.max_new_tokens > max_length:
            raise EngineError(
                f"a prompt of {length} tokens and {params.max_new_tokens} new ones exceed the model's "
                f"{max_length}",
                where=where,
                remedy="lower sampling.max_new_tokens or remove the prompt; prompts are never cut",
            )
        checked.add(request.prompt_token_ids)


def check_scores(
    sequences: Sequence[ScoreRequest],
    *,
    vocab_size: int,
    max_length: int | None,
    temperature: float = 1.0,
    only_at_1: bool = False,
) -> None:
    """Refuse sequences that the model cannot score. Raises EngineError naming the row.

    only_at_1 : whether the engine has the log-probs of temperature 1 alone.
    """
    if not 0 < temperature < math.inf:
        raise EngineError(f"temperature {temperature} must be a number above 0")
    if only_at_1 and temperature != 1:
        raise EngineError(
            f"this engine gives log-probs at temperature 1, not {temperature:g}",
            remedy="score with the engine transformers",
        )
    for row, sequence in enumerate(sequences):
        _check_tokens(sequence.prompt_token_ids, vocab_size, f"row {row}")
        if sequence.token_ids:
            _check_tokens(sequence.token_ids, vocab_size, f"row {row}")
        length = len(sequence.prompt_token_ids) + len(sequence.token_ids)
        if max_length is not None and length > max_length:
            raise EngineError(
                f"a sequence of {length} tokens exceeds the model's {max_length}",
                where=f"row {row}",
                remedy="remove it; sequences are never cut",
            )


def _check_tokens(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    if not ids:
        raise EngineError("an empty prompt", where=where, remedy="a prompt has at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise EngineError(f"token id {wrong} is outside the vocabulary of {vocab_size}", where=where)
