"""LoRA: low-rank adapters beside frozen weights, by peft, and the policy they merge into."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from qrpo_core.config import TrainingConfig
from qrpo_core.errors import ConfigError

_ALL = "all-linear"  # peft's name for every linear layer but the output head


def require_peft() -> None:
    """Raise ConfigError where peft is not installed; imports nothing."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "training.lora_rank needs the package peft",
            where="training.lora_rank",
            remedy="pip install 'qrpo[lora]'",
        )


def add_adapters(model: Any, training: TrainingConfig) -> Any:
    """Freeze a model and put adapters beside its layers (peft's PeftModel around it); B is zero, so at first
    the policy is what it was. Draws the initial A from torch's random state.

    Raises ConfigError for a name in training.lora_targets that is no layer of the model.
    """
    require_peft()
    import peft

    targets = training.lora_targets
    if targets != (_ALL,):
        _check_targets(model, targets)
    config = peft.LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=_ALL if targets == (_ALL,) else list(targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks the model by a name that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(model, config)


def save_adapters(adapted: Any, directory: Path) -> None:
    """Write the adapters as PeftModel.from_pretrained(model, directory) reads them.

    The name of the model that they belong to is left out: it would be a path of this machine.
    """
    import peft
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = None
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order differs from run to run
    config.save_pretrained(directory)


def merge(adapted: Any) -> Any:
    """The model with its adapters added to its weights, W + (alpha / rank) B A, in the weights' own dtype."""
    return adapted.merge_and_unload()


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    import torch

    # peft itself is content when one of the names is found.
    names = {name for name, _ in model.named_modules()}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"training.lora_targets names {target!r}, which is no layer of {type(model).__name__}",
                where="training.lora_targets",
                remedy=f"give {_ALL} alone, or names of its layers: {', '.join(known)}",
            )
