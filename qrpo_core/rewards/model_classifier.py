"""A sequence classifier on its device: golden rows, batches by length, halved when memory runs out."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from qrpo_core.engines.numerics import compute_dtype, pick_device
from qrpo_core.engines.passes import Passes
from qrpo_core.errors import ConfigError, EngineError, ModelError
from qrpo_core.policy import no_progress_bars
from qrpo_core.rewards.config import ModelRewardConfig
from qrpo_core.rewards.model_source import check_label

Ids = tuple[int, ...]
Side = Literal["right", "left"]

#: Largest difference of a row's scores alone and in a padded batch, as a share of max(1, |score|). Of
#: bfloat16 only a grid of 2^-8 of each activation is kept, and the order of sums depends on shapes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

#: Golden rows come from this many first rows; so many are compared, in batches with this much more padding.
_FIRST, _GOLDEN, _EXTRA = 64, 4, 5
#: Tokens a thread that a CPU scores at a time, at the most: measured with 135M weights, batches of 1024 and
#: more took a quarter longer a row than batches of 512, whose activations stay in its cache.
_CPU_TOKENS = 512
#: A tokenizer that knows no limit says 1e30.
_NO_LIMIT = 10**9


class Classifier:
    """The model of a directory and what it takes to score rows of token ids with it.

    Parameters
    ----------
    folder : what `from_pretrained` loads.
    config : the reward's section; code of the model's own is run only with `trust_remote_code`.
    tokenizer : gives the longest input and, where the model's config has none, candidates for padding.
    device : None takes an accelerator where there is one.

    max_length : longest row in tokens: `config.max_length`, else the smaller of the tokenizer's and the
        model's own.
    side : where rows are padded: on the right, or on the left if only that agrees with unpadded rows
        (`check`). None until the first rows came.

    Arithmetic is float32 where bfloat16 is not native. A bfloat16 model's last layer is computed in float32:
    otherwise scores would lie on a grid of 2^-8 of their size, and rows be tied that are not.
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
        #: A padding token of our choice, which the head must never meet at the end of a row.
        self._chosen = self._pad is None
        budget = config.batch_tokens
        if self._device.type == "cpu":
            budget = min(budget, _CPU_TOKENS * torch.get_num_threads())
        self._passes = Passes(budget)
        self.side: Side | None = None

    def scores(self, names: Mapping[Ids, str], done: Callable[[Ids], None]) -> dict[Ids, float]:
        """The output for every row: batches by length, at most `batch_tokens` tokens with their padding.

        names : what each row is called in messages, by its token ids (at most `max_length` of them).
        done : called with each row when it is scored.

        Raises EngineError where golden rows disagree (before anything else is scored) and for a single row
        that does not fit into memory; ModelError where no token can serve as padding.
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
        """The side on which padding changes no score, found on golden rows.

        A few of `rows`, the shortest and the longest among them, are scored alone without padding and
        together with more padding than they need. Raises EngineError with the numbers where neither side
        agrees to `TOLERANCE`: then a score would depend on its batch.
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
            # NaN alone is the row's own fault (a parse_error) and says nothing of padding.
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
        """The outputs of rows in one batch, [rows]; `width` None pads to the longest. No halving."""
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
            # On the right, a row's positions count from 0 anyhow.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            return self._reward(logits, len(rows))

    def close(self) -> None:
        """Give the memory back; the classifier is of no use afterwards."""
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
        """Hand every row's output over to `keep`, pass by pass. width : all are padded to it."""

        def work(places: list[int]) -> None:
            batch = [rows[place] for place in places]
            for ids, value in zip(batch, self.padded(batch, side, width).tolist(), strict=True):
                keep(ids, value)

        lengths = [width or len(ids) for ids in rows]
        self._passes.run(lengths, work, name=lambda row: names[rows[row]])

    def _each(
        self, rows: Sequence[Ids], names: Mapping[Ids, str], side: Side, width: int
    ) -> npt.NDArray[np.float64]:
        """The outputs of different rows padded to `width`, [rows]."""
        found: dict[Ids, float] = {}
        self._score(rows, names, side, found.__setitem__, width)
        return np.array([found[ids] for ids in rows])

    def _choose_pad(self, rows: Sequence[Ids]) -> None:
        """Where the model's config names no padding: a special token that ends no row.

        Heads of causal models read the last token that is not padding, so another token in that place
        is all that it needs. Without padding in the config, an unpadded row is read at its last token.
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
    """The classifier's tokenizer; its own code is run only with `trust_remote_code`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer: {error}", where=str(folder)) from None


def _load(folder: Path, config: ModelRewardConfig) -> Any:
    from transformers import AutoModelForSequenceClassification

    with no_progress_bars():
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the reward model: {error}", where=str(folder)) from None
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            # transformers fills them with random numbers: scores of such a head mean nothing.
            raise ModelError(
                f"{len(keys)} weights are {problem.split('_')[0]}, the first is {keys[0]}",
                where=str(folder),
                remedy="give the complete checkpoint of a reward model, its head included",
            )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # keys and values of the whole batch, for nothing
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
    """Positions that a RoBERTa-like model skips; None for models that count from 0.

    Such models derive positions from the padding itself, wherever it is.
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
