"""Requirements of the engine vllm: an interpreter with vLLM, GPUs, the arguments of vLLM's LLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.config.engines import VllmConfig
from qrpo_core.models.precision import compute_dtype, dtype_name
from qrpo_core.models.rounding import engine_directory

#: Values that vLLM accepts for max_lora_rank.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LOCAL = Path(".venv-vllm/bin/python")
_REMEDY = "make vllm-env, or name the interpreter of an environment with vLLM"


def interpreter(config: VllmConfig) -> str:
    """The interpreter that has vLLM, chosen as `VllmConfig.python` describes."""
    if config.python is not None:
        return str(Path(config.python).expanduser())
    return str(_LOCAL.absolute()) if _LOCAL.exists() else sys.executable


def require(config: VllmConfig) -> None:
    """Raise ConfigError if vLLM is not installed or the GPUs do not suffice. Does not import vLLM."""
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
    gpus = visible_gpus()
    gpu_groups(config, gpus)
    if config.batch_invariant and not gpus:
        raise ConfigError(
            "vllm.batch_invariant is true, and no NVIDIA GPU is visible",
            where="vllm.batch_invariant",
            remedy="set it to false: vLLM has no batch-invariant kernels for a CPU",
        )


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs in CUDA_VISIBLE_DEVICES, or all if it is not set. Does not initialise CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip() not in ("", "-1")]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def gpu_groups(config: VllmConfig, gpus: Sequence[str]) -> list[list[str]]:
    """The GPUs of each engine, an empty list for an engine on the CPU. Raises ConfigError if too few."""
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


def compute_dtype_name(dtype: str) -> str:
    """The dtype in which vLLM computes for weights of `dtype`.

    On a CPU without native bfloat16 it is float32, as with the transformers engine.
    """
    return dtype if visible_gpus() else dtype_name(compute_dtype(dtype, "cpu"))


def llm_arguments(
    directory: Path, dtype: str, config: VllmConfig, adapters: Path | str | None
) -> dict[str, Any]:
    """JSON-ready arguments of vLLM's LLM. Weights wider than its dtype are replaced by a rounded copy."""
    computed = compute_dtype_name(dtype)
    arguments: dict[str, Any] = {
        "model": str(engine_directory(directory, computed).absolute()),
        "dtype": computed,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_fraction,
        "max_model_len": config.max_length,
        "enforce_eager": config.eager,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own settings (top_k, penalties) would change the draw
        "logprobs_mode": "raw_logprobs",  # at temperature 1 for every sampling temperature
    }
    if config.max_sequences is not None:
        arguments["max_num_seqs"] = config.max_sequences
    if adapters is not None:
        arguments |= {"enable_lora": True, "max_loras": 1} | _lora_arguments(Path(adapters))
    return arguments


def _lora_arguments(adapters: Path) -> dict[str, Any]:
    """The adapters' rank and target layers as arguments of LLM. Raises EngineError for an unusable directory.

    Without the list of layers vLLM would also adapt the output head, and fail to give the log-probs of given
    tokens.
    """
    path = adapters / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
        layers = config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"no LoRA adapters: {error}", where=str(path), remedy="see save_adapters") from None
    fitting = [size for size in _RANKS if size >= rank]
    if not fitting:
        raise EngineError(f"vLLM takes no adapters of rank {rank}", where=str(path), remedy="merge them")
    if not isinstance(layers, list):
        raise EngineError(
            f"target_modules {layers!r} is not a list", where=str(path), remedy="name the layers"
        )
    names = sorted({str(layer).rpartition(".")[2] for layer in layers})
    return {"max_lora_rank": fitting[0], "lora_target_modules": names}
