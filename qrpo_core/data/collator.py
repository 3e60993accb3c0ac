"""Training examples and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One completion with its calibrated target.

    target : f(R_q) - beta log Z, in reward units.
    beta : KL strength of this example (it may depend on the length).
    ref_logprob : log pi_ref(completion | prompt), nats.
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    target: float
    beta: float
    ref_logprob: float


class Collator:
    """Right-padded batches: prompt, completion, padding.

    Right padding needs no attention mask in a causal model, since no token sees what follows it; the mask
    is given all the same. Gives tensors

    input_ids [batch, length], attention_mask [batch, length], completion_mask [batch, length]
    (1 at completion tokens), target, beta, ref_logprob [batch] (float64).
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(e.prompt_token_ids) + len(e.token_ids) for e in examples)
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        completion_mask = torch.zeros(shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            start, tokens = len(example.prompt_token_ids), [*example.prompt_token_ids, *example.token_ids]
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            attention_mask[row, : len(tokens)] = 1
            completion_mask[row, start : len(tokens)] = True
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "target": torch.tensor([e.target for e in examples], dtype=torch.float64),
            "beta": torch.tensor([e.beta for e in examples], dtype=torch.float64),
            "ref_logprob": torch.tensor([e.ref_logprob for e in examples], dtype=torch.float64),
        }
