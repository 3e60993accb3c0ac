"""Score rows of token ids with a sequence classifier, in batches by length."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from qrpo_core.common.errors import ConfigError, EngineError, ModelError
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.models.loading import load_weights
from qrpo_core.models.microbatches import Microbatches
from qrpo_core.models.precision import compute_dtype, pick_device
from qrpo_core.rewards.model.source import check_label

Ids = tuple[int, ...]
Side = Literal["right", "left"]

#: Largest difference between a row's scores alone and in a padded batch, relative to max(1, |score|).
#: bfloat16 keeps 2^-8 of each activation, and the order of sums depends on shapes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

#: Golden rows are picked from the first rows: how many first rows, golden rows, and extra padding tokens.
_FIRST, _GOLDEN, _EXTRA = 64, 4, 5
#: Most tokens a thread in a batch on a CPU. Measured with 135M weights: batches of 1024 and more took a
#: quarter longer a row than batches of 512, whose activations stay in the cache.
_CPU_TOKENS = 512
#: A tokenizer without a limit says 1e30.
_NO_LIMIT = 10**9


class Classifier:
    """A reward model on its device.

    Parameters
    ----------
    folder : directory for `from_pretrained`.
    config : section of the reward; the model's own code runs only with `trust_remote_code`.
    tokenizer : gives the longest input and, if the model's config has no padding token, candidates for it.
    device : None takes an accelerator if there is one.

    max_length : longest row in tokens: `config.max_length`, else the smaller limit of tokenizer and model.
    side : side of the padding: right, or left if only that agrees with unpadded rows (`check`). None before
        the first rows.

    Arithmetic is float32 if bfloat16 is not native. The last layer of a bfloat16 model is computed in
    float32: otherwise scores would lie on a grid of 2^-8 of their size, which makes false ties.
    """

    def __init__(
        self, folder: Path, config: ModelRewardConfig, tokenizer: Any, *, device: str | None = None
    ) -> None:
        self._device = torch.device(device) if device else pick_device()
        self._config, self._tokenizer, self._where = config, tokenizer, str(folder)
        model = _load(folder, config)
        model.to(self._device, compute_dtype(config.dtype, self._device))
        self._dtype: torch.dtype = model.dtype
        if self._dtype != torch.float32 and type(model).__module__.startswith("transformers."):
            _float32_head(model)
        self._model: Any = model
        self._accepts = inspect.signature(model.forward).parameters
        offset = _position_offset(model)
        self._own_positions = offset is not None
        self.max_length = _max_length(config, tokenizer, model, offset or 0, self._where)
        self._pad: int | None = _text_config(model).pad_token_id
        #: Whether we choose the padding token; then no row may end with it.
        self._chosen = self._pad is None
        budget = config.batch_tokens
        if self._device.type == "cpu":
            budget = min(budget, _CPU_TOKENS * torch.get_num_threads())
        self._microbatches = Microbatches(budget)
        self.side: Side | None = None

    def scores(self, names: Mapping[Ids, str], done: Callable[[Ids], None]) -> dict[Ids, float]:
        """Return the score of every row. A batch has at most `batch_tokens` tokens, padding included.

        names : name of each row in messages, by its token ids (at most `max_length` of them).
        done : called with each row after its score.

        Raises EngineError if golden rows disagree (before any other row is scored) and for a single row that
        does not fit into memory; ModelError if no token can serve as padding.
        """
        if not names:
            return {}
        if self.side is None:
            self.side = self.check([ids for ids, _ in zip(names, range(_FIRST), strict=False)], names)
        found: dict[Ids, float] = {}

        def keep(ids: Ids, value: float) -> None:
            found[ids] = value
            done(ids)

        self._score(list(names), names, self.side, keep)
        return found

    def check(self, rows: Sequence[Ids], names: Mapping[Ids, str]) -> Side:
        """Return the side on which padding changes no score of the golden rows.

        A few of `rows`, with the shortest and the longest, are scored alone without padding and together with
        extra padding. Raises EngineError with the numbers if neither side agrees to `TOLERANCE`: then a score
        would depend on its batch.
        """
        by_length = sorted(dict.fromkeys(rows), key=lambda ids: (len(ids), ids))
        places = np.linspace(0, len(by_length) - 1, min(_GOLDEN, len(by_length))).astype(int)
        golden = [by_length[place] for place in places]
        self._choose_pad(golden)
        width = min(self.max_length, len(golden[-1]) + _EXTRA)
        alone = np.array([self._each([ids], names, "right", len(ids))[0] for ids in golden])
        limit = TOLERANCE[self._dtype]
        reports = []
        sides: tuple[Side, ...] = ("right", "left")
        for side in sides:
            padded = self._each(golden, names, side, width)
            with np.errstate(invalid="ignore"):
                share = np.abs(padded - alone) / np.maximum(1.0, np.abs(alone))
            # A row with NaN even alone becomes a parse_error; it says nothing about padding.
            if not np.any((share > limit) | (np.isnan(padded) != np.isnan(alone))):
                return side
            worst = int(np.nanargmax(share)) if not np.isnan(share).all() else 0
            reports.append(
                f"{side}: {padded[worst]:.6g} instead of {alone[worst]:.6g} ({names[golden[worst]]})"
            )
        raise EngineError(
            f"scores depend on padding beyond {limit:g} of their size; {'; '.join(reports)}",
            where=self._where,
            remedy="the model's code must mask padding and find the last token of a padded row",
        )

    def padded(self, rows: Sequence[Ids], side: Side, width: int | None = None) -> npt.NDArray[np.float64]:
        """Return the outputs of one batch, [rows]. `width` None pads to the longest row."""
        width = width or max(map(len, rows))
        self._refuse_pad_at_the_end(rows)
        ids = torch.full((len(rows), width), self._pad or 0, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[place, span] = torch.tensor(row)
            mask[place, span] = 1
        inputs = {"input_ids": ids}
        if "attention_mask" in self._accepts or "kwargs" in self._accepts:
            inputs["attention_mask"] = mask
        if side == "left" and "position_ids" in self._accepts and not self._own_positions:
            # With padding on the right, positions count from 0 anyway.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            return self._reward(logits, len(rows))

    def close(self) -> None:
        """Free the memory. The classifier cannot be used afterwards."""
        self._model = None
        self._free()

    def _reward(self, logits: torch.Tensor, rows: int) -> npt.NDArray[np.float64]:
        if logits.ndim == 1:
            logits = logits[:, None]
        if logits.ndim != 2 or len(logits) != rows:
            raise ModelError(
                f"{rows} rows gave logits of shape {tuple(logits.shape)}",
                where=self._where,
                remedy="a sequence classifier gives [rows, labels]",
            )
        check_label(self._config, logits.shape[1])
        values: npt.NDArray[np.float64] = logits[:, self._config.label or 0].double().cpu().numpy()
        return values

    def _score(
        self,
        rows: Sequence[Ids],
        names: Mapping[Ids, str],
        side: Side,
        keep: Callable[[Ids, float], None],
        width: int | None = None,
    ) -> None:
        """Call `keep` with every row's output, batch by batch. width : all rows are padded to it."""

        def work(places: list[int]) -> None:
            batch = [rows[place] for place in places]
            for ids, value in zip(batch, self.padded(batch, side, width).tolist(), strict=True):
                keep(ids, value)

        lengths = [width or len(ids) for ids in rows]
        self._microbatches.run_padded(lengths, work, name=lambda row: names[rows[row]])

    def _each(
        self, rows: Sequence[Ids], names: Mapping[Ids, str], side: Side, width: int
    ) -> npt.NDArray[np.float64]:
        """Return the outputs of distinct rows padded to `width`, [rows]."""
        found: dict[Ids, float] = {}
        self._score(rows, names, side, found.__setitem__, width)
        return np.array([found[ids] for ids in rows])

    def _choose_pad(self, rows: Sequence[Ids]) -> None:
        """Choose a special token that ends no row as padding, if the model's config has no padding token.

        Heads of causal models read the last token that is not padding, so any token that ends no row serves.
        """
        if not self._chosen or self._pad is not None:
            return
        tokenizer, ends = self._tokenizer, {row[-1] for row in rows}
        known = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
        for token in [*known, *tokenizer.all_special_ids]:
            if token is not None and token not in ends:
                self._pad = int(token)
                self._model.config.pad_token_id = _text_config(self._model).pad_token_id = self._pad
                return
        raise ModelError(
            "no token can serve as padding: the config names none, and every special token ends a row",
            where=self._where,
            remedy="set pad_token_id in the model's config.json",
        )

    def _refuse_pad_at_the_end(self, rows: Sequence[Ids]) -> None:
        for row in rows:
            if self._chosen and self._pad is not None and row[-1] == self._pad:
                raise EngineError(
                    f"a row ends with token {self._pad}, which serves as padding here",
                    where=self._where,
                    remedy="set pad_token_id in the model's config.json to a token that ends no row",
                )

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def load_tokenizer(folder: Path, config: ModelRewardConfig) -> Any:
    """Return the classifier's tokenizer. Its own code runs only with `trust_remote_code`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer: {error}", where=str(folder)) from None


def _load(folder: Path, config: ModelRewardConfig) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = load_weights(
        AutoModelForSequenceClassification,
        folder,
        "reward model",
        dtype=getattr(torch, config.dtype),
        trust_remote_code=config.trust_remote_code,
    )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # it would hold the whole batch's keys and values in vain
    return model.eval()


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _float32_head(model: Any) -> None:
    """Compute the last linear layer, which gives the labels, in float32."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    heads = [layer for layer in linear if layer.out_features == model.config.num_labels]
    if heads:
        heads[-1].float()
        heads[-1].register_forward_pre_hook(lambda _, args: tuple(value.float() for value in args))


def _position_offset(model: Any) -> int | None:
    """Return the positions that a RoBERTa-like model skips; None for models that count from 0.

    RoBERTa-like models derive positions from the padding, on either side.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return None if module.padding_idx is None else module.padding_idx + 1
    return None


def _max_length(config: ModelRewardConfig, tokenizer: Any, model: Any, offset: int, where: str) -> int:
    own = getattr(_text_config(model), "max_position_embeddings", None)
    positions = own - offset if own else None
    if config.max_length is not None:
        if positions and config.max_length > positions:
            raise ConfigError(
                f"reward.model.max_length {config.max_length} is above the model's {positions} positions",
                where=where,
                remedy=f"lower it to {positions} or less, or leave it out",
            )
        return config.max_length
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < _NO_LIMIT]
    if not limits:
        raise ConfigError(
            "neither the model nor its tokenizer says how long an input may be",
            where=where,
            remedy="set reward.model.max_length",
        )
    return int(min(limits))
