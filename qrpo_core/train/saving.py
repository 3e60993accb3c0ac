"""From trained weights to a saved policy, with the proof that one is the other.

A training that is done leaves `trained/` in its work directory: the policy in float32, what was logged, and
how probable the policy in memory finds some training rows. The policy that is committed is made from that, so
that a refusal, or a kill on the way, costs no training: another `training.save_dtype` starts from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qrpo_core.config import TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.numerics import dtype_name, pick_device
from qrpo_core.errors import ModelError, ObjectiveError
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
    if training.lora_rank is not None:
        save_adapters(policy, folder / _POLICY / _ADAPTER)
        policy = merge(policy)
    policy.save_pretrained(folder / _POLICY)
    load_tokenizer(directory).save_pretrained(folder / _POLICY)
    done = Trained(history, list(logprobs))
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

    Raises ModelError where the training did not survive; `out` is then empty, and what `keep` left is still
    there.
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
    if dtype == "float32":
        shutil.copytree(trained, out, copy_function=_link)
    else:
        write_bfloat16(trained, out)
        if adapted:
            shutil.copytree(trained / _ADAPTER, out / _ADAPTER)
        saved = scores(out, dtype)
    tokens = [([int(i) for i in row.prompt_token_ids], [int(i) for i in row.token_ids]) for row in rows]
    scored = ScoredRows(dtype, temperature, tokens, start, list(logprobs), saved)
    try:
        require_share(scored)
    except ModelError:
        shutil.rmtree(out)
        raise
    return scored


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
    found = sorted({dtype_name(weight.dtype) for weight in model.parameters()})
    if found != [dtype]:
        raise ModelError(
            f"the saved policy loads in {' and '.join(found)}, not in {dtype}",
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
