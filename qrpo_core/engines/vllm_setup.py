"""What the engine vllm needs: an interpreter that has vLLM, GPUs, the arguments of its LLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrpo_core.engines.config import VllmConfig
from qrpo_core.engines.numerics import compute_dtype, dtype_name
from qrpo_core.errors import ConfigError, EngineError
from qrpo_core.rounding import engine_directory

#: Ranks that vLLM makes room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LOCAL = Path(".venv-vllm/bin/python")
_REMEDY = "make vllm-env, or name the interpreter of an environment with vLLM"


def interpreter(config: VllmConfig) -> str:
    """The interpreter that has vLLM, as `VllmConfig.python` describes it."""
    if config.python is not None:
        return str(Path(config.python).expanduser())
    return str(_LOCAL.absolute()) if _LOCAL.exists() else sys.executable


def require(config: VllmConfig) -> None:
    """Raise ConfigError where vLLM cannot be run as asked; starts a bare interpreter at most."""
    python = interpreter(config)
    if python == sys.executable:
        found = importlib.util.find_spec("vllm") is not None
    else:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            found = (
                subprocess.run([python, "-I", "-c", look], capture_output=True, timeout=60).returncode == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            found = False
    if not found:
        raise ConfigError(f"{python} has no vLLM", where="vllm.python", remedy=_REMEDY)
    gpu_groups(config, visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs of NVIDIA's that CUDA_VISIBLE_DEVICES leaves, else all; neither torch nor CUDA is started."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return told.split()


def gpu_groups(config: VllmConfig, gpus: Sequence[str]) -> list[list[str]]:
    """The GPUs of every engine; an empty list an engine on the CPU. Raises ConfigError where they lack."""
    size = config.tensor_parallel_size
    if not gpus:
        return [[] for _ in range(config.engines or 1)]
    count = config.engines or len(gpus) // size
    if count < 1 or count * size > len(gpus):
        raise ConfigError(
            f"{max(count, 1)} engines of {size} GPUs each, and {len(gpus)} are visible",
            where="vllm.engines, vllm.tensor_parallel_size",
            remedy="lower one of them, or set CUDA_VISIBLE_DEVICES",
        )
    return [list(gpus[number * size : (number + 1) * size]) for number in range(count)]


def arithmetic(dtype: str) -> str:
    """In which precision vLLM multiplies weights that are asked for in `dtype`.

    Where a CPU multiplies no bfloat16 itself, the transformers engine computes in float32, too.
    """
    return dtype if visible_gpus() else dtype_name(compute_dtype(dtype, "cpu"))


def llm_arguments(
    directory: Path, dtype: str, config: VllmConfig, adapters: Path | str | None
) -> dict[str, Any]:
    """Arguments of vLLM's LLM, JSON-ready. Weights wider than its arithmetic are given as a rounded copy."""
    computed = arithmetic(dtype)
    arguments: dict[str, Any] = {
        "model": str(engine_directory(directory, computed).absolute()),
        "dtype": computed,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.memory_share,
        "max_model_len": config.max_length,
        "max_num_seqs": config.max_sequences,
        "enforce_eager": config.eager,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own would change what is drawn (top_k, penalties)
        "logprobs_mode": "raw_logprobs",  # at temperature 1, whatever the draw
    }
    if not visible_gpus():
        # Reading a prompt in pieces, vLLM rewinds the generators of seeded rows; those of the CPU cannot.
        arguments["enable_chunked_prefill"] = False
    if adapters is not None:
        arguments |= {"enable_lora": True, "max_loras": 1} | _lora_arguments(Path(adapters))
    return arguments


def _lora_arguments(adapters: Path) -> dict[str, Any]:
    """Room for the adapters' rank, and the layers that have any. Raises EngineError for what is no adapters.

    Without the list vLLM would treat the output head as adapted as well, and fail to score given tokens.
    """
    path = adapters / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
        layers = config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"no LoRA adapters: {error}", where=str(path), remedy="see save_adapters") from None
    fitting = [room for room in _RANKS if room >= rank]
    if not fitting:
        raise EngineError(f"vLLM takes no adapters of rank {rank}", where=str(path), remedy="merge them")
    if not isinstance(layers, list):
        raise EngineError(f"target_modules {layers!r} is no list", where=str(path), remedy="name the layers")
    names = sorted({str(layer).rpartition(".")[2] for layer in layers})
    return {"max_lora_rank": fitting[0], "lora_target_modules": names}
