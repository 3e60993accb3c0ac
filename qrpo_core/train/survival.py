"""How much of a training is left in what was written: log-probs of training rows, before and after.

The starting policy, the policy in memory and what was written score the same rows in float32 arithmetic. The
share that survived is the slope of written on trained log-ratios, least squares through the origin: 1 where
what was written is what was trained, 0 where it is the starting policy.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrpo_core.data.collator import Collator, Example, Item, length, rows_of
from qrpo_core.engines.passes import Passes
from qrpo_core.errors import ModelError
from qrpo_core.evaluation.saved import LOWEST_SHARE, saved_in_words

if TYPE_CHECKING:
    import torch

#: Training rows that are scored: enough for a slope, seconds of work.
ROWS = 64
#: Tokens of a pass; no gradients are kept.
_PASS_TOKENS = 4096
#: What two orders of the same float32 sums may differ by, in nats: a part of the log-prob, and a rest.
#: Measured differences of a policy and its copy are a tenth of this and less.
_NOISE, _LEAST_NOISE = 1e-5, 1e-3
#: A merge adds up in another order what the adapters added: this part of the log-ratio.
_MERGE_NOISE = 0.01
#: A rounded policy that was not trained: nats a token that rounding may move it by.
_ROUNDING_NOISE = 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Survival:
    """What is left of a training, on `rows` training rows; log-probs in nats.

    share : slope of written on trained log-ratios; None where training moved no more than rounding does.
    trained, written : mean |log-ratio| to the starting policy, of the policy in memory and of what was
        written.
    largest_difference : largest |written - trained| of a row.
    """

    rows: int
    share: float | None
    trained: float
    written: float
    largest_difference: float

    @property
    def words(self) -> str:
        return saved_in_words(dataclasses.asdict(self))


@dataclass(frozen=True)
class ScoredRows:
    """Training rows, and their log-probs in nats under the starting policy, the trained and the saved one.

    rows : prompt and completion tokens of each. dtype : precision of what was saved. temperature : of all
        log-probs, that of the training.
    """

    dtype: str
    temperature: float
    rows: list[tuple[list[int], list[int]]]
    start: list[float]
    trained: list[float]
    saved: list[float]

    @property
    def survival(self) -> Survival:
        """What is left of the training in what was saved."""
        return survival(self.start, self.trained, self.saved)

    @property
    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return {"dtype": self.dtype, **dataclasses.asdict(self.survival)}

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ScoredRows:
        value = json.loads(data)
        return cls(**{**value, "rows": [(prompt, tokens) for prompt, tokens in value["rows"]]})


@dataclass(frozen=True)
class Outcome:
    """What a training gives beside the policy.

    history : what was logged, one entry a step. scored : the comparison of what was saved with what was
        trained; None in every process of a training but the first.
    """

    history: list[dict[str, float]]
    scored: ScoredRows | None


def chosen_rows(items: Sequence[Item]) -> list[Example]:
    """Up to ROWS rows of what is trained on, evenly spread and always the same."""
    rows = [row for item in items for row in rows_of(item)]
    places = np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def float32_logprobs(
    model: Any, rows: Sequence[Example], device: torch.device, temperature: float = 1.0
) -> list[float]:
    """log pi(completion | prompt) of each row in nats, by a model with float32 weights, without autocast.

    temperature : pi is softmax(logits / temperature).
    """
    import torch

    from qrpo_core.train.forward import policy_logprobs

    model.eval()
    sums = np.zeros(len(rows))

    def score(places: list[int]) -> None:
        batch = Collator(0)([rows[place] for place in places])
        names = ("input_ids", "attention_mask", "completion_mask")
        ids, mask, completion = (batch[name].to(device) for name in names)
        sums[places] = policy_logprobs(model, ids, mask, completion, temperature).double().cpu()

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        Passes(_PASS_TOKENS).run([length(row) for row in rows], score)
    return [float(value) for value in sums]


def survival(start: Sequence[float], trained: Sequence[float], written: Sequence[float]) -> Survival:
    """What is left of a training, from log-probs of the same rows."""
    base, moved, kept = np.asarray(start), np.asarray(trained), np.asarray(written)
    one, other = moved - base, kept - base
    shown = np.abs(one).mean() > _noise(moved).mean()
    return Survival(
        rows=len(base),
        share=float(one @ other / (one @ one)) if shown else None,
        trained=float(np.abs(one).mean()),
        written=float(np.abs(other).mean()),
        largest_difference=float(np.abs(other - one).max()),
    )


def require_same(
    start: Sequence[float], trained: Sequence[float], saved: Sequence[float], *, adapted: bool
) -> None:
    """Refuse float32 weights that are not the policy in memory. ModelError gives the largest difference.

    adapted : whether adapters were merged into them.
    """
    moved, written = np.asarray(trained), np.asarray(saved)
    room = _noise(moved) + _MERGE_NOISE * np.abs(moved - np.asarray(start))
    off = np.abs(written - moved)
    if not (off <= room).all():
        found = survival(start, trained, saved)
        merged = "the merge of the adapters" if adapted else "saving this model"
        raise ModelError(
            f"{merged} makes another policy than the one that was trained: {found.words}",
            where="training.lora_targets" if adapted else "model.path",
            remedy="leave layers whose weights others share out of training.lora_targets"
            if adapted
            else "save_pretrained does not write what this model computes with; use another model",
        )


def require_share(scored: ScoredRows) -> None:
    """Refuse a rounded policy in which too little of the training is left, naming what to set. ModelError."""
    found = scored.survival
    if found.share is None:
        longest = max(len(tokens) for _, tokens in scored.rows)
        fits = found.largest_difference <= _ROUNDING_NOISE * longest
    else:
        fits = abs(found.share - 1) <= 1 - LOWEST_SHARE
    if not fits:
        raise ModelError(
            f"saved in {scored.dtype}, the policy is not the one that was trained: {found.words}",
            where=f"training.save_dtype {scored.dtype!r}",
            remedy="set training.save_dtype: float32; the training is kept and not done again",
        )


def _noise(logprobs: Floats) -> Floats:
    noise: Floats = _LEAST_NOISE + _NOISE * np.abs(logprobs)
    return noise
