"""Training examples, pairs of them, and the padded batches made of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qrpo_core.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One completion and what the objectives need to know of it.

    prompt_token_ids, token_ids : the prompt (never in the loss) and the completion (all of it in the loss).
    target : calibrated target f(R_q) - beta log Z, in reward units (qrpo).
    beta : KL strength of this example (qrpo; it may depend on the length).
    ref_logprob : log pi_ref(completion | prompt), nats.
    reward : the raw reward (rebel).
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    target: float = 0.0
    beta: float = 1.0
    ref_logprob: float = 0.0
    reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example


Item: TypeAlias = Example | Pair


def rows_of(item: Item) -> tuple[Example, ...]:
    """The rows that an item takes in a batch: one, or chosen and rejected."""
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def length(example: Example) -> int:
    """Tokens of prompt and completion together."""
    return len(example.prompt_token_ids) + len(example.token_ids)


class Collator:
    """Right-padded batches: prompt, completion, padding.

    Right padding needs no attention mask in a causal model, since no token sees what follows it; the mask
    is given all the same. An example is one row; pair i is rows 2i (chosen) and 2i + 1 (rejected). Gives

    input_ids, attention_mask [rows, length] int64, completion_mask [rows, length] bool (completion tokens);
    target, beta, ref_logprob, reward, length (completion tokens) [rows] float64;
    weight [items] float64, 1: an item of weight 0 (set by the trainer) fills a micro-batch, nothing more.

    Raises DataError for no items, or for a mixture of examples and pairs.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        import torch

        kinds = sorted({type(item).__name__ for item in items})
        if len(kinds) != 1:
            raise DataError(
                f"a batch of {' and '.join(kinds) or 'nothing'}",
                remedy="give items of one kind, at least one",
            )
        rows = [row for item in items for row in rows_of(item)]
        shape = (len(rows), max(length(row) for row in rows))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        completion_mask = torch.zeros(shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            start, tokens = len(row.prompt_token_ids), [*row.prompt_token_ids, *row.token_ids]
            input_ids[place, : len(tokens)] = torch.tensor(tokens)
            attention_mask[place, : len(tokens)] = 1
            completion_mask[place, start : len(tokens)] = True

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)

        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "target": column([row.target for row in rows]),
            "beta": column([row.beta for row in rows]),
            "ref_logprob": column([row.ref_logprob for row in rows]),
            "reward": column([row.reward for row in rows]),
            "length": column([len(row.token_ids) for row in rows]),
            "weight": column([1.0] * len(items)),
        }
