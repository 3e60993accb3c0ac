"""Packed rows: sequences one behind another in one row, without padding, and prompts that completions share.

A packed row is what goes through the model at once. Rows of equal prompt form a group: the prompt stands once
and its completions behind it, each of which sees the prompt and itself. Positions start anew in each group,
and every completion of a group continues from the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qrpo_core.common.errors import DataError

if TYPE_CHECKING:
    import torch

#: Kernels start work for the longest segment; a power of two keeps the number of distinct values small, for
#: each of which torch.compile may compile again. A length of 1 would take a path of its own in the kernel.
_LEAST_LENGTH = 128


class Segments(NamedTuple):
    """Which tokens of a packed row see which; one value for every layer of a model.

    Queries lie as in the row. Segment s sees the keys key_index[key_starts[s] : key_starts[s + 1]]: those of
    its prefix, then its own up to the query's (causal, aligned to the lower right).

    query_starts, key_starts : int32 [segments + 1], on the model's device.
    key_index : int64 [keys], the token of each key; None if keys lie as in the row (no completions).
    longest_query, longest_key : an upper bound of a segment's queries and keys.
    lengths : queries of each segment. prefixes : the segment that precedes each one's keys, or -1. Both are
        on the host, so that nothing waits for the device.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    key_index: torch.Tensor | None
    longest_query: int
    longest_key: int
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A packed row and the completion tokens that it predicts.

    input_ids, position_ids : int64 [1, tokens].
    segments : which tokens see which.
    sources : int64 [labels], the token whose hidden state predicts each label.
    labels : int64 [labels], all completion tokens, row by row.
    cells : int64 [labels], the place of each label in a table [rows, longest completion].
    shape : that table's shape.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    sources: torch.Tensor
    labels: torch.Tensor
    cells: torch.Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        """The same on a device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedRow:
        """The same in pinned memory; DataLoader calls it."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedRow:
        segments, index = self.segments, self.segments.key_index
        segments = segments._replace(
            query_starts=move(segments.query_starts),
            key_starts=move(segments.key_starts),
            key_index=None if index is None else move(index),
        )
        return PackedRow(
            move(self.input_ids),
            move(self.position_ids),
            segments,
            move(self.sources),
            move(self.labels),
            move(self.cells),
            self.shape,
        )


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> PackedRow:
    """Pack rows into one, in the order of their prompts' first rows; equal prompts stand once.

    prompts, completions : token ids of each row. A completion may be empty.

    Raises DataError for a row without prompt tokens: nothing predicts its first token.
    """
    layout = _Layout()
    groups: dict[bytes, list[int]] = {}
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    for row, prompt in enumerate(ids):
        if not len(prompt):
            raise DataError("a row has no prompt tokens, so nothing predicts its first token")
        groups.setdefault(prompt.tobytes(), []).append(row)
    sources: dict[int, NDArray[np.int64]] = {}
    for rows in groups.values():
        # Before one completion, too: other shapes round in another way, so company would change its log-prob
        shared = layout.add(ids[rows[0]])
        for row in rows:
            sources[row] = layout.add_completion(np.asarray(completions[row], np.int64), shared)
    return layout.packed(completions, [sources[row] for row in range(len(ids))])


class _Layout:
    """A packed row that grows segment by segment."""

    def __init__(self) -> None:
        self.tokens: list[NDArray[np.int64]] = []
        self.positions: list[NDArray[np.int64]] = []
        self.starts = [0]
        self.prefixes: list[int] = []

    def add(self, tokens: NDArray[np.int64], prefix: int = -1) -> int:
        """Add a segment and return its number."""
        behind = 0 if prefix < 0 else len(self.tokens[prefix])
        self.tokens.append(tokens)
        self.positions.append(np.arange(behind, behind + len(tokens)))
        self.starts.append(self.starts[-1] + len(tokens))
        self.prefixes.append(prefix)
        return len(self.prefixes) - 1

    def add_completion(self, completion: NDArray[np.int64], prompt: int) -> NDArray[np.int64]:
        """Add a completion behind the segment of its prompt; return the sources of its tokens."""
        count, first = len(completion), self.starts[-1]
        if count:
            self.add(completion, prompt)
        return np.concatenate([[self.starts[prompt + 1] - 1], np.arange(first, first + count - 1)])[:count]

    def packed(self, completions: Sequence[Sequence[int]], sources: Sequence[NDArray[np.int64]]) -> PackedRow:
        import torch

        def tensor(values: Sequence[NDArray[np.int64]] | NDArray[np.int64]) -> torch.Tensor:
            whole = values if isinstance(values, np.ndarray) else np.concatenate(values)
            return torch.from_numpy(whole.astype(np.int64))

        counts = [len(completion) for completion in completions]
        longest = max(1, *counts)
        cells = [row * longest + np.arange(count) for row, count in enumerate(counts)]
        return PackedRow(
            tensor(self.tokens)[None],
            tensor(self.positions)[None],
            self._segments(),
            tensor(sources),
            tensor([np.asarray(completion, np.int64) for completion in completions]),
            tensor(cells),
            (len(counts), longest),
        )

    def _segments(self) -> Segments:
        import torch

        lengths = tuple(len(tokens) for tokens in self.tokens)
        spans = [np.arange(start, end) for start, end in pairwise(self.starts)]
        keys = [
            spans[number] if prefix < 0 else np.concatenate([spans[prefix], spans[number]])
            for number, prefix in enumerate(self.prefixes)
        ]
        sizes = [len(one) for one in keys]
        shared = any(prefix >= 0 for prefix in self.prefixes)
        return Segments(
            torch.tensor(self.starts, dtype=torch.int32),
            torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32)),
            torch.from_numpy(np.concatenate(keys)) if shared else None,
            _bound(max(lengths)),
            _bound(max(sizes)),
            lengths,
            tuple(self.prefixes),
        )


def _bound(length: int) -> int:
    """The next power of two, at least `_LEAST_LENGTH`."""
    return max(_LEAST_LENGTH, 1 << (length - 1).bit_length())
