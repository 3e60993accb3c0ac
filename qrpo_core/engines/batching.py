"""Plan which requests are decoded together, and in which tensor shapes.

On a CPU a row's tokens depend on its own request alone. Floating-point results of matrix products depend on
shapes, so there the shapes in which a row is computed follow from that row: its prompt is prefilled alone and
unpadded, and it is decoded in a batch whose numbers of slots and positions follow from its own length. On an
accelerator rows are not exact anyway: shapes follow from its memory, and prompts are prefilled together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qrpo_core.engines.base import SampleRequest

#: Positions of the smallest batch; larger batches have 2^k or 1.5 * 2^k. Unused positions are masked.
_SMALLEST = 96
#: Slots of a batch; above 512 positions there are fewer, to keep slots * positions near 32,768.
_SLOTS, _FEWEST_SLOTS, _CELLS = 64, 8, 32768
#: Slots by memory are at most this many: above it a step takes as long as its reads, so more save nothing.
_MOST_SLOTS = 1024
#: Bytes of a step for each slot and token of the vocabulary: logits, weights and, for top_p, their order.
_VOCABULARY_BYTES = 64
#: Positions that a step on an accelerator reads at least; then 2, 4, 8 ... times as many.
_FEWEST_VISIBLE = 256


@dataclass(frozen=True)
class DecodeBatch:
    """Rows decoded together, `slots` at a time, each with `positions` places in the key-value cache.

    rows : indices into the requests. Equal prompts are neighbours, so each prompt is prefilled once.
    """

    slots: int
    positions: int
    rows: tuple[int, ...]


def positions_for(length: int) -> int:
    """Cache positions for a row of `length` tokens (prompt and max_new_tokens); at most a half more."""
    size = _SMALLEST
    while size < length:
        size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2
    return size


def slots_for(positions: int) -> int:
    """Slots of a batch on a CPU: 64, and for long rows fewer (at least 8), to limit memory."""
    return max(_FEWEST_SLOTS, min(_SLOTS, _CELLS // positions // 8 * 8))


def slots_by_memory(free_bytes: int, position_bytes: int, positions: int, vocab_size: int) -> int:
    """Slots of a batch on an accelerator: as many as half of the free memory holds, from 8 to 1,024.

    position_bytes : keys and values of one token: layers * key-value heads * head dimension * 2 * bytes of a
        number.
    """
    slot_bytes = positions * position_bytes + vocab_size * _VOCABULARY_BYTES
    return max(_FEWEST_SLOTS, min(_MOST_SLOTS, free_bytes // 2 // slot_bytes // 8 * 8))


def visible_for(length: int, positions: int) -> int:
    """Positions that a step reads when its longest row has `length` tokens: 256 * 2^k, at most `positions`.

    A step is captured once for each number, so there are few of them.
    """
    visible = _FEWEST_VISIBLE
    while visible < length:
        visible *= 2
    return min(visible, positions)


def decode_batches(
    requests: Sequence[SampleRequest], max_new_tokens: int, *, slots: int | None = None
) -> list[DecodeBatch]:
    """Divide the requests into batches.

    slots : None lets shapes follow from each row's own length. A number makes one batch of all requests with
        that many slots, for accelerators, where rows are not exact anyway.
    """
    lengths = [len(request.prompt_token_ids) + max_new_tokens for request in requests]
    if not lengths:
        return []
    order = sorted(range(len(requests)), key=lambda row: (lengths[row], requests[row].prompt_token_ids, row))
    if slots is not None:
        return [DecodeBatch(slots, positions_for(max(lengths)), tuple(order))]
    sizes: dict[int, list[int]] = {}
    for row in order:
        sizes.setdefault(positions_for(lengths[row]), []).append(row)
    return [DecodeBatch(slots_for(size), size, tuple(rows)) for size, rows in sizes.items()]


def prefill_groups(
    prompts: Sequence[tuple[int, ...]], tokens: int | None
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Divide prompts, in their order, into groups that are prefilled in one pass.

    tokens : of a pass, padding included; a longer prompt is alone. None puts every prompt alone.
    """
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        longest = max(map(len, [*group, prompt]))
        if group and (tokens is None or (len(group) + 1) * longest > tokens):
            yield tuple(group)
            group = []
        group.append(prompt)
    if group:
        yield tuple(group)
