"""Seeded draws in vLLM's older model runner (V1). vLLM's processes load this file without our package.

That runner gives a seeded row a generator of its own and draws row by row. Here a row's random numbers are
those of `sampling.uniforms` and all rows are drawn at once; vLLM, asked for the most probable token, finds
the drawn one. The newer runner (V2) draws seeded rows in one kernel and needs none of this.
"""

from __future__ import annotations

import runpy
from array import array
from pathlib import Path
from typing import Any, NamedTuple

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ModuleNotFoundError:  # where this project is installed, vLLM need not be
    LogitsProcessor = object

_sampling = runpy.run_path(str(Path(__file__).with_name("sampling.py")))

#: The key of a request's `extra_args`; its value: [seed, temperature, top_p]. Its own temperature is 0.
SEEDED = "qrpo_seeded"


class _Row(NamedTuple):
    """noise : a random number in [0, 1) for each token. drawn : the tokens so far; vLLM extends this list."""

    noise: array[float]
    drawn: list[int]
    temperature: float
    top_p: float


class SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """Raises the logit of each row's drawn token to infinity.

    Token t of a row is the one that the engine transformers draws from the same logits: number t of the
    row's seed in the cumulative distribution at the row's temperature and top_p. vLLM takes its log-probs
    from the logits before this.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it decides the most probable token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that entered the batch, left it or moved in it, in this order of vLLM's."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._rows.pop(place, None)
        for place, params, _, drawn in batch_update.added:
            self._rows.pop(place, None)
            asked = (params.extra_args or {}).get(SEEDED)
            if asked is not None:
                seed, temperature, top_p = asked
                # One more than it takes, for a step that vLLM begins before it knows the end of a row.
                noise = array("d", _sampling["uniforms"](seed, params.max_tokens + 1).tobytes())
                self._rows[place] = _Row(noise, drawn, temperature, top_p)
        for one, other, direction in batch_update.moved:
            moved, replaced = self._rows.pop(one, None), self._rows.pop(other, None)
            if moved is not None:
                self._rows[other] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[one] = replaced

    def apply(self, logits: Any) -> Any:
        """logits [rows, vocab] float32, changed in place. Raises RuntimeError for rows of two kinds."""
        import torch

        if not self._rows:
            return logits
        settings = {(row.temperature, row.top_p) for row in self._rows.values()}
        if len(self._rows) != len(logits) or len(settings) > 1:
            raise RuntimeError(f"{len(self._rows)} seeded rows of {len(settings)} kinds among {len(logits)}")
        rows = [self._rows[place] for place in range(len(logits))]
        numbers = [row.noise[len(row.drawn)] for row in rows]
        noise = torch.tensor(numbers, dtype=torch.float64).to(self._device, non_blocking=True)
        tokens = _sampling["pick_tokens"](logits, noise, *settings.pop())
        return logits.scatter_(1, tokens[:, None], float("inf"))
