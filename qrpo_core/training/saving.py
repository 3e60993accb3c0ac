"""From trained weights to a saved policy, and the comparison of the two.

A finished training leaves `trained/` in its work directory: the policy in float32, the logged metrics, and
the log-probs of some training rows under the policy in memory. The committed policy is made from that, so a
refusal or a kill costs no training: another `training.save_dtype` starts from there.
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

from qrpo_core.common.errors import ModelError, ObjectiveError, StoreError
from qrpo_core.config import TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.models.precision import dtype_name, pick_device
from qrpo_core.models.rounding import write_bfloat16
from qrpo_core.training.checkpoints import delete_checkpoints, seal, sealed
from qrpo_core.training.lora import add_adapters, merge, save_adapters
from qrpo_core.training.survival import (
    LogprobComparison,
    float32_logprobs,
    require_same,
    require_share,
)

TRAINED = "trained"
_POLICY, _ADAPTER, _SUMMARY = "policy", "adapter", "trained.json"


@contextlib.contextmanager
def _disk_errors(work: Path) -> Iterator[None]:
    """Raise errors of the disk, such as a full one, as StoreError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write the trained policy: {error}",
            where=str(work),
            remedy="make room there and in the temporary folder, and run again: finished parts are used",
        ) from error


@dataclass(frozen=True)
class Trained:
    """A finished training.

    history : the logged metrics, one entry a step.
    logprobs : of some training rows under the policy in memory, nats, float32 arithmetic.
    """

    history: list[dict[str, float]]
    logprobs: list[float]


def store_trained(
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
    """Write trained weights to `work` as a float32 policy with its adapters, and delete its checkpoints.

    logprobs : of the policy in memory. None under DeepSpeed, whose weights are in 16 bits and in pieces: the
        log-probs of the gathered weights are taken, before adapters are merged.
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
    with _disk_errors(work):
        if training.lora_rank is not None:
            save_adapters(policy, folder / _POLICY / _ADAPTER)
            policy = merge(policy)
        policy.save_pretrained(folder / _POLICY)
        load_tokenizer(directory).save_pretrained(folder / _POLICY)
        (folder / _SUMMARY).write_text(json.dumps(dataclasses.asdict(done)), encoding="utf-8")
        seal(folder, facts)
    delete_checkpoints(work)
    return done


def load_trained(work: Path, facts: dict[str, Any]) -> Trained | None:
    """The finished training in `work`, or None. Raises StoreError if it is another training's."""
    folder = sealed(work / TRAINED, facts, ("training",))
    return None if folder is None else Trained(**json.loads((folder / _SUMMARY).read_text(encoding="utf-8")))


def save(
    rows: Sequence[Example],
    logprobs: Sequence[float],
    directory: Path,
    out: Path,
    *,
    training: TrainingConfig,
    work: Path,
) -> LogprobComparison:
    """Write the stored policy to `out` in `training.save_dtype`; return its comparison with the trained one.

    logprobs : of the rows under the policy in memory. directory : of the starting policy.

    Raises ModelError if too little of the training survived or the tokenizer changed, StoreError if `out`
    cannot be written. `store_trained`'s files stay.
    """
    trained, dtype = work / TRAINED / _POLICY, training.save_dtype
    adapted, temperature = (trained / _ADAPTER).is_dir(), training.temperature or 1.0

    def logprobs_of(folder: Path, stored: str | None) -> list[float]:
        device = pick_device()
        model = load_model(folder, "float32") if stored is None else _as_loaded(folder, stored)
        return float32_logprobs(model.float().to(device), rows, device, temperature)

    start, saved = logprobs_of(directory, None), logprobs_of(trained, "float32")
    require_same(start, logprobs, saved, adapted=adapted)
    shutil.rmtree(out, ignore_errors=True)
    with _disk_errors(work):
        if dtype == "float32":
            shutil.copytree(trained, out, copy_function=_link)
        else:
            write_bfloat16(trained, out)
            for folder in filter(Path.is_dir, trained.iterdir()):  # adapters, further chat templates
                shutil.copytree(folder, out / folder.name)
    if dtype != "float32":
        saved = logprobs_of(out, dtype)
    tokens = [([int(i) for i in row.prompt_token_ids], [int(i) for i in row.token_ids]) for row in rows]
    comparison = LogprobComparison(dtype, temperature, tokens, start, list(logprobs), saved)
    try:
        require_same_tokenizer(directory, out, rows)
        require_share(comparison)
    except ModelError:
        shutil.rmtree(out)
        raise
    return comparison


def check_tokenizer(directory: Path, rows: Sequence[Example]) -> None:
    """Raise ModelError, before training, if saving would change the tokenizer."""
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
