"""LoRA: low-rank adapters beside frozen weights, by peft, and the policy they merge into."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, ModelError
from qrpo_core.common.extras import require
from qrpo_core.config import TrainingConfig
from qrpo_core.models.loading import load_model, no_progress_bars
from qrpo_core.models.source import ModelSource

_ALL = "all-linear"  # peft's name for every linear layer but the output head


def add_adapters(model: Any, training: TrainingConfig) -> Any:
    """The model, frozen, with adapters beside its layers (a PeftModel); B is zero: the policy is unchanged.

    Draws the initial A from torch's random state. Raises ConfigError for targets that `check_targets`
    refuses.
    """
    require("peft", "training.lora_rank")
    import peft

    targets = training.lora_targets
    check_targets(model, targets)
    config = peft.LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=_ALL if targets == (_ALL,) else list(targets),
        task_type="CAUSAL_LM",
    )
    with _quiet():
        return peft.get_peft_model(model, config)


def save_adapters(adapted: Any, directory: Path) -> None:
    """Write the adapters in the form that PeftModel.from_pretrained(model, directory) reads.

    The name of the base model is left out: it would be a path of this machine.
    """
    import peft
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    # An embedding's own weight is not trained: it is not saved beside its adapter.
    found = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = None
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order differs from run to run
    config.save_pretrained(directory)


def load_adapters(model: Any, directory: Path, dtype: str) -> Any:
    """A float32 model with saved adapters beside its layers, rounded to `dtype` as engines load them.

    Rounding is relative to the adapters' own small values, so it costs a part of them and no more.
    """
    import peft
    import torch

    with _quiet():
        adapted = peft.PeftModel.from_pretrained(model, directory)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(getattr(torch, dtype)).float()
    return adapted


def restore_base(adapted: Any, directory: Path) -> None:
    """Give an adapted model the frozen float32 weights of a directory again."""
    base = adapted.get_base_model()
    kept = dict(load_model(directory, "float32").named_parameters(remove_duplicate=False))
    for name, weight in base.named_parameters():
        if not weight.requires_grad:
            weight.data = kept[name.replace(".base_layer.", ".")].data.to(weight.device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence a warning: peft reads an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def merge(adapted: Any) -> Any:
    """The model with its adapters added to its weights, W + (alpha / rank) B A, in the weights' own dtype."""
    return adapted.merge_and_unload()


def check_targets_of_source(source: ModelSource, training: TrainingConfig) -> None:
    """`check_targets` from the config of a model, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place: dict[str, Any] = {"local_files_only": True}
    if source.kind == "hub":
        name, place["revision"] = source.location, source.identity["commit"]
    elif source.kind == "gguf":
        name, place["gguf_file"] = str(Path(source.location).parent), Path(source.location).name
    else:
        name = source.location
    try:
        with no_progress_bars(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **place))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model's config: {error}", where=source.location) from None
    check_targets(model, training.lora_targets)


def check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Raise ConfigError, with the layer and the remedy, for targets that cannot have adapters.

    These are all-linear beside other names (peft would look for a layer of that name), an unknown name, a
    layer type without low-rank adapters, the output head (log-probs are computed from its plain weight), and
    a layer that shares its weight with another one (tied embeddings: a merge would change both).
    """
    if _ALL in targets and len(targets) > 1:
        names = ", ".join(sorted({*targets} - {_ALL}))
        raise _refused(model, f"training.lora_targets names {_ALL} beside {names or 'itself'}")
    known = dict(model.named_modules())
    picked = {name: target for target in targets for name in _matched(model, known, target)}
    head = model.get_output_embeddings()
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0])
    for name, target in picked.items():
        module = known[name]
        others = sorted(
            {owner for weight in module.parameters(recurse=False) for owner in owners[id(weight)]} - {name}
        )
        if others:
            problem = f"layer {name}, whose weight is also that of {', '.join(others)}"
        elif module is head:
            problem = f"the output head {name}, from whose plain weight log-probs are computed"
        elif not _takes_adapters(module):
            problem = f"{name}, a {type(module).__name__}, which takes no low-rank adapters"
        else:
            continue
        raise _refused(model, f"training.lora_targets names {target!r}: {problem}")


def _matched(model: Any, known: dict[str, Any], target: str) -> list[str]:
    """The layers to which peft adds adapters for a target."""
    if target == _ALL:
        linear = {name: module for name, module in known.items() if _is_linear(module)}
        return [name for name, module in linear.items() if module is not model.get_output_embeddings()]
    # peft reports unknown names only if it finds none of the targets.
    found = [name for name in known if name == target or name.endswith(f".{target}")]
    if not found:
        problem = f"training.lora_targets names {target!r}, which is no layer of {type(model).__name__}"
        raise _refused(model, problem)
    return found


def _refused(model: Any, problem: str) -> ConfigError:
    head = model.get_output_embeddings()
    fitting = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head
    }
    return ConfigError(
        problem,
        where="training.lora_targets",
        remedy=f"give {_ALL} alone, or names of its layers: {', '.join(sorted(fitting))}",
    )


def _takes_adapters(module: Any) -> bool:
    import torch

    return _is_linear(module) or isinstance(module, torch.nn.Embedding)


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)
