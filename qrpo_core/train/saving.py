"""From trained weights to a saved policy, with the proof that one is the other.

A training that is done leaves `trained/` in its work directory: the policy in float32, what was logged, and
how probable the policy in memory finds some training rows. The policy that is committed is made from that, so
that a refusal, or a kill on the way, costs no training: another `training.save_dtype` starts from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from qrpo_core.config import TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.numerics import dtype_name, pick_device
from qrpo_core.errors import ModelError, ObjectiveError, StoreError
from qrpo_core.policy import load_model, load_tokenizer
from qrpo_core.rounding import write_bfloat16
from qrpo_core.train.checkpoints import drop_checkpoints, seal, whole
from qrpo_core.train.lora import add_adapters, merge, save_adapters
from qrpo_core.train.survival import (
    ScoredRows,
    float32_logprobs,
    require_same,
    require_share,
)

TRAINED = "trained"
_POLICY, _ADAPTER, _TOLD = "policy", "adapter", "trained.json"


@contextlib.contextmanager
def _told(work: Path) -> Iterator[None]:
    """A disk that is full, or the like, as a StoreError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write the trained policy: {error}",
            where=str(work),
            remedy="make room there and in the temporary folder, and run again: what is whole is used",
        ) from error


@dataclass(frozen=True)
class Trained:
    """A training that is done.

    history : what was logged, one entry a step.
    logprobs : of the chosen training rows under the policy in memory, nats, float32 arithmetic.
    """

    history: list[dict[str, float]]
    logprobs: list[float]


def keep(
    weights: dict[str, torch.Tensor],
    rows: Sequence[Example],
    logprobs: Sequence[float] | None,
    history: list[dict[str, float]],
    *,
    directory: Path,
    training: TrainingConfig,
    work: Path,
    facts: dict[str, Any],
) -> Trained:
    """Leave trained weights in `work`, as a float32 policy with its adapters; then its checkpoints go.

    logprobs : of the policy in memory. None where it cannot say (DeepSpeed's is in 16 bits, and in pieces):
        then those of the weights that it gave, before adapters are merged.
    """
    folder = work / TRAINED
    shutil.rmtree(folder, ignore_errors=True)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ObjectiveError(
                f"{name} is not finite after training", remedy="lower training.learning_rate"
            )
    policy = load_model(directory, "float32")
    if training.lora_rank is not None:
        policy = add_adapters(policy, training)
    _fill(policy, weights)
    if logprobs is None:
        logprobs = float32_logprobs(policy, rows, torch.device("cpu"), training.temperature or 1.0)
    if not np.isfinite(logprobs).all():
        raise ObjectiveError(
            "log-probs of the trained policy are not finite: training diverged",
            remedy="lower training.learning_rate",
        )
    done = Trained(history, list(logprobs))
    with _told(work):
        if training.lora_rank is not None:
            save_adapters(policy, folder / _POLICY / _ADAPTER)
            policy = merge(policy)
        policy.save_pretrained(folder / _POLICY)
        load_tokenizer(directory).save_pretrained(folder / _POLICY)
        (folder / _TOLD).write_text(json.dumps(dataclasses.asdict(done)), encoding="utf-8")
        seal(folder, facts)
    drop_checkpoints(work)
    return done


def kept(work: Path, facts: dict[str, Any]) -> Trained | None:
    """What `keep` left of this training; None where it is not done. StoreError for that of another one."""
    folder = whole(work / TRAINED, facts, ("training",))
    return None if folder is None else Trained(**json.loads((folder / _TOLD).read_text(encoding="utf-8")))


def save(
    rows: Sequence[Example],
    logprobs: Sequence[float],
    directory: Path,
    out: Path,
    *,
    training: TrainingConfig,
    work: Path,
) -> ScoredRows:
    """Write the policy that `keep` left to `out` in `training.save_dtype`; compare it with what was trained.

    logprobs : of the rows under the policy in memory. directory : of the starting policy.

    Raises ModelError where the training did not survive or the tokenizer is another one, StoreError where
    `out` cannot be written; what `keep` left is still there.
    """
    trained, dtype = work / TRAINED / _POLICY, training.save_dtype
    adapted, temperature = (trained / _ADAPTER).is_dir(), training.temperature or 1.0

    def scores(folder: Path, asked: str | None) -> list[float]:
        device = pick_device()
        model = load_model(folder, "float32") if asked is None else _as_loaded(folder, asked)
        return float32_logprobs(model.float().to(device), rows, device, temperature)

    start, saved = scores(directory, None), scores(trained, "float32")
    require_same(start, logprobs, saved, adapted=adapted)
    shutil.rmtree(out, ignore_errors=True)
    with _told(work):
        if dtype == "float32":
            shutil.copytree(trained, out, copy_function=_link)
        else:
            write_bfloat16(trained, out)
            for folder in filter(Path.is_dir, trained.iterdir()):  # adapters, further chat templates
                shutil.copytree(folder, out / folder.name)
    if dtype != "float32":
        saved = scores(out, dtype)
    tokens = [([int(i) for i in row.prompt_token_ids], [int(i) for i in row.token_ids]) for row in rows]
    scored = ScoredRows(dtype, temperature, tokens, start, list(logprobs), saved)
    try:
        require_same_tokenizer(directory, out, rows)
        require_share(scored)
    except ModelError:
        shutil.rmtree(out)
        raise
    return scored


def check_tokenizer(directory: Path, rows: Sequence[Example]) -> None:
    """`require_same_tokenizer` of what `keep` will write, before it costs a training."""
    with tempfile.TemporaryDirectory() as scratch:
        load_tokenizer(directory).save_pretrained(scratch)
        require_same_tokenizer(directory, Path(scratch), rows)


def require_same_tokenizer(directory: Path, written: Path, rows: Sequence[Example]) -> None:
    """Refuse a tokenizer, chat template included, that is written as another. ModelError.

    directory : of the starting policy. rows : the texts on which both are compared, in both directions.
    """
    ours, theirs = load_tokenizer(directory), load_tokenizer(written)
    different = "the chat template" if ours.chat_template != theirs.chat_template else ""
    for row in rows:
        tokens = [int(token) for token in (*row.prompt_token_ids, *row.token_ids)]
        text = ours.decode(tokens)
        again = [each.encode(text, add_special_tokens=False) for each in (ours, theirs)]
        if theirs.decode(tokens) != text or again[0] != again[1]:
            different = f"the tokens of {text[:80]!r}"
    if different:
        raise ModelError(
            f"the tokenizer is another one once it is saved: {different} differ",
            where=str(directory),
            remedy="give a directory whose tokenizer save_pretrained has written",
        )


def in_memory(model: Any) -> Any:
    """The trained model without what training put around it: processes' wrappers, bfloat16 autocast.

    Autocast was put around the `forward` of this very object, so without that it has its class's again.
    """
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    model.__dict__.pop("forward", None)
    return model


def _as_loaded(directory: Path, dtype: str) -> Any:
    """A saved policy as from_pretrained loads it by default, which must be in `dtype`."""
    model = load_model(directory, "auto")
    # Of the model, not of its weights: some classes keep a few in float32 (the router of Ernie 4.5).
    found = dtype_name(model.config.dtype)
    if found != dtype:
        raise ModelError(
            f"the saved policy loads in {found}, not in {dtype}",
            where=str(directory / "config.json"),
            remedy="report this: save_pretrained wrote another dtype than that of the weights",
        )
    return model


def _fill(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load a state dict, casting; only a weight that is tied to one of its weights may be missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {parameters[name].data_ptr() for name in weights if name in parameters}
    left = [name for name in missing if name not in parameters or parameters[name].data_ptr() not in filled]
    if left or unexpected:
        raise ModelError(f"the trained weights do not fit the policy: {[*left, *unexpected][0]}")


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
