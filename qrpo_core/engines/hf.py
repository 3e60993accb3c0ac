"""The embedded engine: transformers models, with a decoding loop whose noise is each sample's own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qrpo_core.data.collator import Collator, Example
from qrpo_core.engines import batching
from qrpo_core.engines.base import (
    Completion,
    Progress,
    SampleRequest,
    SamplingParams,
    ScoreRequest,
    no_progress,
)
from qrpo_core.engines.decoding import Decoder, TableRun
from qrpo_core.engines.numerics import (
    compute_dtype,
    dtype_name,
    mixed_precision,
    native_bfloat16,
    pick_device,
)
from qrpo_core.engines.passes import Passes
from qrpo_core.engines.slots import ATTENTION, SlotCache
from qrpo_core.errors import EngineError, ModelError
from qrpo_core.policy import load_model
from qrpo_core.rounding import engine_directory
from qrpo_core.train.forward import CHECKED_TOKENS, check_head, token_logprobs


class TransformersEngine:
    """Draws from and scores with the model of a directory.

    Parameters
    ----------
    directory : what `from_pretrained` loads.
    dtype : "bfloat16" or "float32", precision of the weights. Wider ones are rounded at random, not to the
        nearest, which would undo a training (qrpo_core/rounding.py).
    batch_size : sequences drawn at a time on an accelerator. On the CPU the number of rows drawn together is
        fixed, since rows would otherwise depend on it (see engines/batching.py).
    batch_tokens : tokens scored at a time, padding included; halved where memory runs out.
    precision : None: arithmetic in `dtype`. "bf16" or "fp32": the trainer's, float32 weights with or
        without bfloat16 autocast.
    device : None takes an accelerator where there is one.

    Where bfloat16 is not native to the device, arithmetic is float32 and nothing is rounded; `name` says
    which it was. `exact` is
    tried on the machine for every shape that is used (`Decoder.slots_agree`), and False on accelerators.
    """

    def __init__(
        self,
        directory: Path | str,
        dtype: str = "bfloat16",
        batch_size: int = 32,
        precision: str | None = None,
        *,
        batch_tokens: int = 16384,
        device: str | None = None,
    ) -> None:
        self._device = torch.device(device) if device else pick_device()
        # The trainer starts from float32 weights, so with a precision they are never rounded first.
        weights = dtype if precision is None else "float32"
        arithmetic = dtype_name(compute_dtype(weights, self._device))
        model = load_model(engine_directory(Path(directory), arithmetic), arithmetic)
        model.to(self._device)
        model.set_attn_implementation(ATTENTION)
        self._loaded: Any = model
        self._precision = precision
        self._batch_size = batch_size
        self._passes = Passes(batch_tokens)
        config = model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._shapes: set[tuple[int, int]] = set()
        self._head_checked = False
        self.exact = self._device.type == "cpu"
        mixed = precision == "bf16" and native_bfloat16(self._device)
        self.name = f"transformers/{self._device.type}/{'bf16-autocast' if mixed else arithmetic}"

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion a request, in the order of the requests.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens` (it is never cut).
        """
        decoder = Decoder(self._model)
        batching.check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        slots = None if self._device.type == "cpu" else self._batch_size
        done: dict[int, Completion] = {}
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            for table in batching.tables(requests, params.max_new_tokens, slots=slots):
                run = TableRun(decoder, table, requests, params, lambda cache: self._try(decoder, cache))
                for index, completion in run:
                    done[index] = completion
                    progress(1)
        return [done[index] for index in range(len(requests))]

    def logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats, [sequences]; log-softmax and sum in float32.

        The trainer's own function on the trainer's own batches, so that the log-ratio begins at 0.
        """
        sums = np.zeros(len(sequences), dtype=np.float64)

        def keep(rows: list[int], values: torch.Tensor) -> None:
            sums[rows] = values.sum(dim=1).double().cpu().numpy()

        self._score(sequences, keep, progress, temperature)
        return sums

    def token_logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | what is before it) of every token of every completion, in nats."""
        found: dict[int, npt.NDArray[np.float64]] = {}

        def keep(rows: list[int], values: torch.Tensor) -> None:
            for row, line in zip(rows, values.double().cpu().numpy(), strict=True):
                start = len(sequences[row].prompt_token_ids)
                found[row] = line[start : start + len(sequences[row].token_ids)]

        self._score(sequences, keep, progress, temperature)
        return [found[row] for row in range(len(sequences))]

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        self._loaded = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _model(self) -> Any:
        if self._loaded is None:
            raise EngineError("the engine is closed", remedy="make a new one")
        return self._loaded

    def _try(self, decoder: Decoder, cache: SlotCache) -> None:
        """Find out once a shape whether rows are exact in it."""
        shape = (cache.slots, cache.positions)
        if self.exact and shape not in self._shapes:
            self.exact = decoder.slots_agree(cache)
            self._shapes.add(shape)

    def _score(
        self,
        sequences: Sequence[ScoreRequest],
        keep: Callable[[list[int], torch.Tensor], None],
        progress: Progress,
        temperature: float,
    ) -> None:
        """Hand log-probs of completion tokens [rows, length], 0 elsewhere, over to `keep`, pass by pass."""
        model = self._model
        batching.check_scores(
            sequences, vocab_size=self._vocab_size, max_length=self._max_length, temperature=temperature
        )

        def score(rows: list[int]) -> None:
            asked = [sequences[row] for row in rows]
            batch = Collator(0)([Example(s.prompt_token_ids, s.token_ids) for s in asked])
            names = ("input_ids", "attention_mask", "completion_mask")
            inputs = {name: batch[name].to(self._device) for name in names}
            if not self._head_checked:
                self._check_head(inputs["input_ids"][:1, :CHECKED_TOKENS])
            values = token_logprobs(model, **inputs, temperature=temperature)
            if not values.isfinite().all():
                raise EngineError(
                    "the model's probabilities are not finite",
                    remedy="the weights may be damaged, or their precision too low",
                )
            keep(rows, values)

        lengths = [len(s.prompt_token_ids) + len(s.token_ids) for s in sequences]
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            self._passes.run(lengths, score, progress)

    def _check_head(self, ids: torch.Tensor) -> None:
        try:
            check_head(self._model, ids)
        except ModelError as error:
            raise EngineError(error.message, remedy=error.remedy) from None
        self._head_checked = True
