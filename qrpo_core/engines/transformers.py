"""The engine in this process: transformers models with our own decoding loop, which seeds every sample."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache

from qrpo_core.common.errors import EngineError, ModelError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.data.packing import pack
from qrpo_core.data.step_plan import ItemSizes
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.batching import DecodeBatch, decode_batches, positions_for, slots_by_memory
from qrpo_core.engines.decode_steps import Decoder, DecodeSteps
from qrpo_core.engines.decoding import BatchDecoding
from qrpo_core.engines.slot_cache import ATTENTION, SlotCache, position_bytes
from qrpo_core.engines.validation import check_logprob_requests, check_samples
from qrpo_core.models.forward import CHECKED_TOKENS, check_head, completion_logprobs, token_logprobs
from qrpo_core.models.loading import load_model
from qrpo_core.models.microbatches import Microbatches
from qrpo_core.models.packed_attention import set_attention
from qrpo_core.models.packing_check import check_packing
from qrpo_core.models.precision import (
    careful_kernels,
    compute_dtype,
    dtype_name,
    mixed_precision,
    native_bfloat16,
    pick_device,
)
from qrpo_core.models.rounding import engine_directory
from qrpo_core.models.split_weights import round_matrices

#: On accelerators: steps between two looks at the drawn tokens, and tokens of a prefill. A look stops the
#: device, and a row that ends between two looks computes half of the steps in vain.
_STEPS_PER_LOOK, _PREFILL_TOKENS = 16, 16384


class TransformersEngine(Engine):
    """Draws from and scores with the model of a directory.

    Parameters
    ----------
    directory : a model directory for `from_pretrained`.
    dtype : "bfloat16" or "float32", precision of the weights. Wider weights are rounded stochastically,
        because rounding to the nearest would undo training (qrpo_core/models/rounding.py).
    batch_size : sequences drawn at a time on an accelerator; None: as many as its memory holds. On the CPU
        the number is fixed, because rows would depend on it (qrpo_core/engines/batching.py).
    batch_tokens : tokens of a microbatch of log-probs; halved when memory runs out.
    precision : None computes in `dtype`. Others compute as the trainer does: "fp32" in float32, "bf16" with
        float32 weights under bfloat16 autocast, "bf16-weights" with bfloat16 matrices under autocast.
    device : None uses an accelerator if there is one.

    On a device without native bfloat16, arithmetic is float32 and nothing is rounded; `name` says so. On the
    CPU, `exact` is tested for every shape in use (`Decoder.slots_agree`); on accelerators it is False.
    """

    def __init__(
        self,
        directory: Path | str,
        dtype: str = "bfloat16",
        batch_size: int | None = None,
        precision: str | None = None,
        *,
        batch_tokens: int = 16384,
        device: str | None = None,
    ) -> None:
        self._device = torch.device(device) if device else pick_device()
        careful_kernels()
        # The trainer starts from float32 weights, so with a precision they are never rounded first.
        weights = dtype if precision is None else "float32"
        arithmetic = dtype_name(compute_dtype(weights, self._device))
        model = load_model(engine_directory(Path(directory), arithmetic), arithmetic)
        model.to(self._device)
        model.set_attn_implementation(ATTENTION)
        self._loaded: Any = model
        self._precision = precision
        self._batch_size = batch_size
        self._microbatches = Microbatches(batch_tokens)
        config = model.config.get_text_config()
        self._vocab_size = int(config.vocab_size)
        self._max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._shapes: set[tuple[int, int]] = set()
        #: On accelerators, the buffers and graphs of the last call.
        self._steps: DecodeSteps | None = None
        self._checked = False
        if precision == "bf16-weights" and native_bfloat16(self._device):
            tokens = list(range(min(CHECKED_TOKENS, self._vocab_size)))
            # In float32 arithmetic, which rounded matrices do not have.
            self._check((tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]))
            round_matrices(model)
        self.exact = self._device.type == "cpu"
        if precision in ("bf16", "bf16-weights") and native_bfloat16(self._device):
            arithmetic = f"{precision}-autocast"
        self.name = f"transformers/{self._device.type}/{arithmetic}"

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion for each request, in their order.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens`; prompts are never cut.
        """
        decoder = Decoder(self._model)
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self._max_length)
        on_cpu = self._device.type == "cpu"
        shape: dict[str, Any] = (
            {} if on_cpu else {"steps_per_look": _STEPS_PER_LOOK, "prefill_tokens": _PREFILL_TOKENS}
        )
        done: dict[int, Completion] = {}
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            slots = None if on_cpu or not requests else self._slots(decoder, requests, params)
            for batch in decode_batches(requests, params.max_new_tokens, slots=slots):
                steps_like = partial(self._steps_like, decoder, batch, params)
                for index, completion in BatchDecoding(decoder, batch, requests, params, steps_like, **shape):
                    done[index] = completion
                    progress(1)
        return [done[index] for index in range(len(requests))]

    def logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats, [sequences]; log-softmax in float32, sums in float64.

        Uses the trainer's function on the trainer's batches, so that log-ratios start at 0.
        """
        sums = np.zeros(len(sequences), dtype=np.float64)

        def keep(rows: list[int], values: torch.Tensor) -> None:
            sums[rows] = completion_logprobs(values).cpu().numpy()

        self._score(sequences, keep, progress, temperature)
        return sums

    def token_logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | preceding tokens) in nats, an array for each completion."""
        found: dict[int, npt.NDArray[np.float64]] = {}

        def keep(rows: list[int], values: torch.Tensor) -> None:
            for row, line in zip(rows, values.double().cpu().numpy(), strict=True):
                found[row] = line[: len(sequences[row].token_ids)]

        self._score(sequences, keep, progress, temperature)
        return [found[row] for row in range(len(sequences))]

    def close(self) -> None:
        """Release the memory."""
        self._loaded = self._steps = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _model(self) -> Any:
        if self._loaded is None:
            raise EngineError("the engine is closed", remedy="make a new one")
        return self._loaded

    def _steps_like(
        self, decoder: Decoder, batch: DecodeBatch, params: SamplingParams, like: Cache
    ) -> DecodeSteps:
        """The steps of a batch; those of the last call, with their graphs, if they fit."""
        if self._steps is not None and self._steps.fit(batch.slots, batch.positions, params):
            return self._steps
        if self._steps is not None:
            self._steps = None  # two caches at a time would take the memory twice
            gc.collect()  # a cache and its layers refer to each other
        cache = SlotCache(like, batch.slots, batch.positions)
        if self._device.type == "cpu":
            self._test_exactness(decoder, cache)
            return DecodeSteps(decoder, cache, params, 1)
        self._steps = DecodeSteps(decoder, cache, params, _STEPS_PER_LOOK)
        return self._steps

    def _slots(self, decoder: Decoder, requests: Sequence[SampleRequest], params: SamplingParams) -> int:
        """Slots on an accelerator: `batch_size`, or by memory and not many more than requests.

        More slots of the last call stay as they are, because new ones would be captured anew.
        """
        if self._batch_size is not None:
            return self._batch_size
        longest = max(len(request.prompt_token_ids) for request in requests)
        positions = positions_for(longest + params.max_new_tokens)
        wanted = max(8, 1 << (len(requests) - 1).bit_length())
        if self._steps is not None:
            slots = self._steps.cache.slots
            if slots >= wanted and self._steps.fit(slots, positions, params):
                return slots
        self._steps = None
        size = position_bytes(decoder.prefill([(0,)]))
        return min(wanted, slots_by_memory(_free_memory(self._device), size, positions, self._vocab_size))

    def _test_exactness(self, decoder: Decoder, cache: SlotCache) -> None:
        """Test, once for each shape, whether rows are exact in it."""
        shape = (cache.slots, cache.positions)
        if self.exact and shape not in self._shapes:
            self.exact = decoder.slots_agree(cache)
            self._shapes.add(shape)

    def _score(
        self,
        sequences: Sequence[LogprobRequest],
        keep: Callable[[list[int], torch.Tensor], None],
        progress: Progress,
        temperature: float,
    ) -> None:
        """Call `keep` with the rows of each microbatch and their log-probs [rows, longest completion]."""
        model = self._model
        check_logprob_requests(
            sequences, vocab_size=self._vocab_size, max_length=self._max_length, temperature=temperature
        )

        def fill(rows: list[int]) -> None:
            packed = pack(*zip(*(texts[row] for row in rows), strict=True)).to(self._device)
            values = token_logprobs(model, packed, temperature)
            if not values.isfinite().all():
                raise EngineError(
                    "the model's probabilities are not finite",
                    remedy="the weights may be damaged, or their precision too low",
                )
            keep(rows, values)

        texts = [(sequence.prompt_token_ids, sequence.token_ids) for sequence in sequences]
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            try:
                if texts and not self._checked:
                    self._check(texts[0])
                self._microbatches.run(ItemSizes.of([text] for text in texts), fill, progress)
            finally:
                set_attention(model, ATTENTION)  # sampling has its own

    def _check(self, text: tuple[Sequence[int], Sequence[int]]) -> None:
        """Check once that log-probs of this model are computed right."""
        tokens = [*text[0], *text[1]][:CHECKED_TOKENS]
        try:
            check_head(self._model, torch.tensor([tokens], device=self._device))
            check_packing(self._model, *text)
        except ModelError as error:
            raise EngineError(error.message, remedy=error.remedy) from None
        finally:
            set_attention(self._model, ATTENTION)
        self._checked = True


def _free_memory(device: torch.device) -> int:
    """Bytes that tensors on a CUDA device may still take; what torch keeps in reserve is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
