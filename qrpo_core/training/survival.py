"""The share of a training that survives saving, measured by log-probs of training rows.

The starting policy, the trained policy in memory and the saved policy give log-probs of the same rows, in
float32 arithmetic. The share is the slope of saved on trained log-ratios, least squares through the origin: 1
if the saved policy equals the trained one, 0 if it equals the starting policy.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qrpo_core.common.errors import ModelError
from qrpo_core.common.formatting import percent
from qrpo_core.data.collator import Example, Item, rows_of
from qrpo_core.data.packing import pack
from qrpo_core.data.step_plan import ItemSizes
from qrpo_core.models.microbatches import Microbatches

if TYPE_CHECKING:
    import torch

#: Training rows that are compared: enough for a slope, seconds of work.
ROWS = 64
#: Below this share a saved policy is refused. Stochastic rounding keeps it within a few hundredths of 1;
#: nearest rounding, at the learning rates of this field, and merges into the wrong weights stay far away.
LOWEST_SHARE = 0.9
#: Tokens of a microbatch; no gradients are kept.
_MICROBATCH_TOKENS = 4096
#: Difference in nats of two orders of the same float32 sums: relative to the log-prob, and absolute.
#: Measured differences of a policy and its copy are a tenth of this and less.
_NOISE, _LEAST_NOISE = 1e-5, 1e-3
#: A merge adds the adapters' terms in another order: relative to the log-ratio.
_MERGE_NOISE = 0.01
#: Nats a token by which rounding may move a policy that training did not move.
_ROUNDING_NOISE = 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Survival:
    """The share of a training that survived, on `rows` training rows; log-probs in nats.

    share : slope of saved on trained log-ratios; None if training moved no more than rounding does.
    trained, written : mean |log-ratio| to the starting policy, of the trained and of the saved policy.
    largest_difference : largest |saved - trained| of a row.
    """

    rows: int
    share: float | None
    trained: float
    written: float
    largest_difference: float

    @property
    def text(self) -> str:
        return survival_text(dataclasses.asdict(self))


def survival_text(facts: Mapping[str, Any]) -> str:
    """One sentence on the share of a training that survived. facts : the fields of a `Survival`."""
    rows = f"on {facts['rows']:,} training rows in float32 arithmetic"
    if facts["share"] is None:
        return (
            "training changed no log-prob by more than rounding does, so no share of it can be stated (from "
            f"what was trained to this: largest difference {facts['largest_difference']:.2g} nats, {rows})"
        )
    return (
        f"{percent(facts['share'])} of the training survived (mean |log-ratio| {facts['written']:.4g} of "
        f"{facts['trained']:.4g} nats, largest difference {facts['largest_difference']:.2g}, {rows})"
    )


@dataclass(frozen=True)
class LogprobComparison:
    """Training rows with their log-probs in nats under the starting, the trained and the saved policy.

    dtype : precision of the saved policy. temperature : of all log-probs, equal to the training's.
    rows : prompt and completion tokens of each row.
    """

    dtype: str
    temperature: float
    rows: list[tuple[list[int], list[int]]]
    start: list[float]
    trained: list[float]
    saved: list[float]

    @property
    def survival(self) -> Survival:
        """The share of the training in the saved policy."""
        return survival(self.start, self.trained, self.saved)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of a manifest."""
        return {"dtype": self.dtype, **dataclasses.asdict(self.survival)}

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LogprobComparison:
        value = json.loads(data)
        return cls(**{**value, "rows": [(prompt, tokens) for prompt, tokens in value["rows"]]})


@dataclass(frozen=True)
class Outcome:
    """The results of a training beside the policy.

    history : the logged metrics, one entry a step.
    comparison : the comparison of the saved with the trained policy; None in all processes but the first.
    """

    history: list[dict[str, float]]
    comparison: LogprobComparison | None


def rows_to_compare(items: Sequence[Item]) -> list[Example]:
    """Up to ROWS training rows, evenly spread; the same items give the same rows."""
    sides = len(rows_of(items[0]))
    count = len(items) * sides
    places = np.linspace(0, count - 1, min(ROWS, count)).round().astype(int).tolist()
    return [rows_of(items[place // sides])[place % sides] for place in places]


def float32_logprobs(
    model: Any, rows: Sequence[Example], device: torch.device, temperature: float = 1.0
) -> list[float]:
    """log pi(completion | prompt) of each row in nats, by a model with float32 weights, without autocast.

    temperature : pi is softmax(logits / temperature).
    """
    import torch

    from qrpo_core.models.forward import policy_logprobs

    model.eval()
    sums = np.zeros(len(rows))
    texts = [(row.prompt_token_ids, row.token_ids) for row in rows]

    def fill(places: list[int]) -> None:
        packed = pack(*zip(*(texts[place] for place in places), strict=True)).to(device)
        sums[places] = policy_logprobs(model, packed, temperature).cpu()

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        Microbatches(_MICROBATCH_TOKENS).run(ItemSizes.of([text] for text in texts), fill)
    return [float(value) for value in sums]


def survival(start: Sequence[float], trained: Sequence[float], saved: Sequence[float]) -> Survival:
    """The share of a training that survived, from log-probs of the same rows."""
    trained_ratio = np.asarray(trained) - np.asarray(start)
    saved_ratio = np.asarray(saved) - np.asarray(start)
    measurable = np.abs(trained_ratio).mean() > _noise(trained).mean()
    return Survival(
        rows=len(start),
        share=float(saved_ratio @ trained_ratio / (trained_ratio @ trained_ratio)) if measurable else None,
        trained=float(np.abs(trained_ratio).mean()),
        written=float(np.abs(saved_ratio).mean()),
        largest_difference=float(np.abs(saved_ratio - trained_ratio).max()),
    )


def require_same(
    start: Sequence[float], trained: Sequence[float], saved: Sequence[float], *, adapted: bool
) -> None:
    """Raise ModelError if saved float32 weights differ from the policy in memory.

    adapted : whether adapters were merged into them.
    """
    tolerance = _noise(trained) + _MERGE_NOISE * np.abs(np.asarray(trained) - np.asarray(start))
    if not (np.abs(np.asarray(saved) - np.asarray(trained)) <= tolerance).all():
        found = survival(start, trained, saved)
        merged = "the merge of the adapters" if adapted else "saving this model"
        raise ModelError(
            f"{merged} gives another policy than the trained one: {found.text}",
            where="training.lora_targets" if adapted else "model.path",
            remedy="leave layers whose weights others share out of training.lora_targets"
            if adapted
            else "save_pretrained does not write the weights that this model uses; use another model",
        )


def require_share(comparison: LogprobComparison) -> None:
    """Raise ModelError if too little of the training survived rounding."""
    found = comparison.survival
    if found.share is None:
        longest = max(len(tokens) for _, tokens in comparison.rows)
        fits = found.largest_difference <= _ROUNDING_NOISE * longest
    else:
        fits = abs(found.share - 1) <= 1 - LOWEST_SHARE
    if not fits:
        raise ModelError(
            f"saved in {comparison.dtype}, the policy differs from the trained one: {found.text}",
            where=f"training.save_dtype {comparison.dtype!r}",
            remedy="set training.save_dtype: float32; the next run saves the finished training again",
        )


def _noise(logprobs: Sequence[float]) -> Floats:
    noise: Floats = _LEAST_NOISE + _NOISE * np.abs(logprobs)
    return noise
