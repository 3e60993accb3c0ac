"""Training examples, pairs of examples, and the packed batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qrpo_core.common.errors import DataError
from qrpo_core.data.packing import pack

if TYPE_CHECKING:
    import pyarrow as pa
    import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One completion and its inputs to the objectives.

    prompt_token_ids, token_ids : the prompt (never in the loss) and the completion (all of it in the loss).
    target : the target in reward units (qrpo, best_of_n, tup: f(R_q) - beta log Z, -inf where tup's label is
        0; a_star: R - V).
    beta : KL strength of this example, for objectives with targets (it may depend on the length).
    ref_logprob : log pi_ref(completion | prompt), nats.
    reward : the raw reward (rebel). log_partition : log Z, nats (tup).
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    target: float = 0.0
    beta: float = 1.0
    ref_logprob: float = 0.0
    reward: float = 0.0
    log_partition: float = 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example


Item: TypeAlias = Example | Pair


def rows_of(item: Item) -> tuple[Example, ...]:
    """Return the rows of an item in a batch: one, or chosen and rejected."""
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)


def length(example: Example) -> int:
    """Return the number of tokens of prompt and completion together."""
    return len(example.prompt_token_ids) + len(example.token_ids)


@dataclass(frozen=True, eq=False)
class ExampleColumns(Sequence[Example]):
    """Examples stored as columns; an item's token ids are numpy views of the Arrow lists.

    prompt_token_ids, token_ids : lists of integers, [rows].
    target, beta, ref_logprob, reward, log_partition : float64 [rows].
    rows : the rows that are items, in order; None means all.
    """

    prompt_token_ids: pa.ChunkedArray
    token_ids: pa.ChunkedArray
    target: NDArray[np.float64]
    beta: NDArray[np.float64]
    ref_logprob: NDArray[np.float64]
    reward: NDArray[np.float64]
    log_partition: NDArray[np.float64]
    rows: NDArray[np.int64] | None = None

    @classmethod
    def of_data_set(cls, data_set: Any) -> ExampleColumns:
        """The rows of a Hugging Face data set, such as the training set that `qrpo export` writes.

        Columns prompt_token_ids and token_ids, and those fields of `Example` that it has; others, and null,
        are the fields' defaults. DataError without the two columns of tokens.
        """
        import pyarrow.compute as pc

        names = ("prompt_token_ids", "token_ids")
        for name in names:
            if name not in data_set.column_names:
                raise DataError(
                    f"the data set has no column {name!r}",
                    where="train_dataset",
                    remedy="make items of text with qrpo_core.pipeline.text_items.text_items",
                )
        table = data_set.with_format("arrow")[:]

        def numbers(name: str, default: float) -> NDArray[np.float64]:
            if name not in table.column_names:
                return np.full(len(table), default)
            filled: NDArray[np.float64] = pc.fill_null(table[name].cast("float64"), default).to_numpy()
            return filled

        fields = {"target": 0.0, "beta": 1.0, "ref_logprob": 0.0, "reward": 0.0, "log_partition": 0.0}
        return cls(
            *(table[name] for name in names), *(numbers(name, value) for name, value in fields.items())
        )

    def __len__(self) -> int:
        return len(self.token_ids) if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        at = int(range(len(self))[index])
        row = at if self.rows is None else int(self.rows[at])
        tokens = (column[row].values.to_numpy() for column in (self.prompt_token_ids, self.token_ids))
        numbers = (self.target, self.beta, self.ref_logprob, self.reward, self.log_partition)
        return Example(*tokens, *(float(column[row]) for column in numbers))


@dataclass(frozen=True, eq=False)
class PairColumns(Sequence[Pair]):
    """Pairs of stored examples; chosen, rejected : their rows, [pairs]."""

    examples: ExampleColumns
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        return Pair(self.examples[self.chosen[index]], self.examples[self.rejected[index]])


class Collator:
    """Batches of one packed row (qrpo_core/data/packing.py), in which equal prompts stand once.

    An example is one row; pair i is rows 2i (chosen) and 2i + 1 (rejected). Gives

    packed : the `PackedRow` of all rows;
    target, beta, ref_logprob, reward, log_partition, length (completion tokens), tokens (of prompt and
    completion) [rows] float64;
    computed [] float64, the tokens of the packed row;
    weight [items] float64, 1: an item of weight 0 (set by the trainer) fills a microbatch, nothing more.

    Raises DataError for no items, or for a mixture of examples and pairs.
    """

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        import torch

        kinds = sorted({type(item).__name__ for item in items})
        if len(kinds) != 1:
            raise DataError(
                f"a batch of {' and '.join(kinds) or 'nothing'}",
                remedy="give items of one kind, at least one",
            )
        rows = [row for item in items for row in rows_of(item)]

        def column(values: Sequence[float] | float) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)

        packed = pack([row.prompt_token_ids for row in rows], [row.token_ids for row in rows])
        return {
            "packed": packed,
            "computed": column(packed.input_ids.numel()),
            "target": column([row.target for row in rows]),
            "beta": column([row.beta for row in rows]),
            "ref_logprob": column([row.ref_logprob for row in rows]),
            "reward": column([row.reward for row in rows]),
            "log_partition": column([row.log_partition for row in rows]),
            "length": column([len(row.token_ids) for row in rows]),
            "tokens": column([length(row) for row in rows]),
            "weight": column([1.0] * len(items)),
        }
