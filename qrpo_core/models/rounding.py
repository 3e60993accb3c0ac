"""Stochastic rounding to bfloat16, which keeps what training changed.

Near 0.1 bfloat16 values are 5e-4 apart, and training at usual learning rates moves a weight by less. Rounding
to the nearest value returns the weight to where it started: at 1e-6 more than nine tenths of the training are
lost. Stochastic rounding rounds up with a probability equal to the relative distance from the value below, so
weights and log-probs are right on average (measured: benchmarks/results/saved_precision.json).
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.errors import StoreError
from qrpo_core.common.hashing import rounding_seed
from qrpo_core.common.local_copies import PART, make_room, mark, use
from qrpo_core.models.source import WEIGHT_FILES, policy_digest, policy_files

if TYPE_CHECKING:
    import torch

#: Part of a copy's name. Raise it when the written copy changes.
VERSION = 1

_CHUNK = 1 << 24  # values rounded at a time, to limit memory
_LOW_BITS = 1 << 16  # float32 has 16 bits more than bfloat16
_WIDER = ("F64", "F32", "F16")  # safetensors' names of dtypes that lose bits in bfloat16
_DTYPE_KEYS = ("dtype", "torch_dtype")


def stochastic_bfloat16(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight in bfloat16, each value rounded up or down at random so that its expectation is the value.

    name : seeds the random numbers. The same weight of two policies gets the same random numbers, so equal
    values stay equal, and nearly equal values are rarely rounded apart.

    Values that bfloat16 can represent, NaN and infinities stay bit for bit. Finite values stay finite.
    """
    import torch

    generator = torch.Generator().manual_seed(rounding_seed(name))
    rounded = torch.empty(weight.numel(), dtype=torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    flat = weight.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        exact = flat[start : start + _CHUNK].to("cpu", torch.float32).contiguous()
        noise = torch.randint(0, _LOW_BITS, exact.shape, generator=generator, dtype=torch.int32)
        # As integers, neighbouring bfloat16 values are 65536 apart, for every exponent.
        noisy = ((exact.view(torch.int32) + noise) & -_LOW_BITS).view(torch.float32)
        kept = torch.where(exact.isfinite(), noisy.clamp(-largest, largest), exact)
        rounded[start : start + _CHUNK] = kept.bfloat16()
    return rounded.view(weight.shape)


def write_bfloat16(directory: Path, out: Path) -> None:
    """Write a copy of a policy with weights rounded by `stochastic_bfloat16`; copy its other files."""
    out.mkdir(parents=True, exist_ok=True)
    for path in policy_files(directory):
        if path.suffix == ".safetensors":
            _round_file(path, out / path.name)
        elif path.name == "config.json":
            _rewrite(path, out / path.name, _with_bfloat16)
        elif path.name.endswith(".safetensors.index.json"):
            _rewrite(path, out / path.name, _without_sizes)
        else:
            shutil.copyfile(path, out / path.name)


def engine_directory(directory: Path, dtype: str) -> Path:
    """The directory to load for computing in `dtype`: the given one, or a rounded copy in the cache.

    A copy is needed if `dtype` is bfloat16 and weights are wider: loading them as bfloat16 would round to the
    nearest. It is made once for each policy (other runs wait), and again if files are missing. Quantised
    models are loaded unchanged.

    Raises StoreError if the copy cannot be written.
    """
    from safetensors import SafetensorError

    use(directory)
    if dtype != "bfloat16" or not _has_wider_weights(directory):
        return directory
    kept = cache_directory() / "rounded" / f"{policy_digest(directory)}-bfloat16-{VERSION}"
    try:
        mark(kept)
        if not _is_complete(kept, directory):
            _make(directory, kept)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write the bfloat16 copy of a policy that the engine loads: {error}",
            where=str(kept),
            remedy="make room there, set QRPO_CACHE to another folder, or set model.dtype: float32",
        ) from None
    return kept


def _make(directory: Path, kept: Path) -> None:
    """Write the copy under another name, then rename it. Removes the remains of a killed run first."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}{PART}")
    with kept.with_name(f"{kept.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends
        if _is_complete(kept, directory):
            return
        for left in (part, kept):
            if left.exists():
                shutil.rmtree(left)
        make_room(_rounded_bytes(directory))
        try:
            write_bfloat16(directory, part)
            part.rename(kept)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _rounded_bytes(directory: Path) -> int:
    """What the weights take in bfloat16. Reads only the headers of the files."""
    from safetensors import safe_open

    values = 0
    for path in policy_files(directory):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                values += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return 2 * values


def _is_complete(kept: Path, directory: Path) -> bool:
    """Whether a copy has every file of its policy, and no weights file is cut off."""
    from safetensors import SafetensorError, safe_open

    if not kept.is_dir() or [path.name for path in policy_files(kept)] != [
        path.name for path in policy_files(directory)
    ]:
        return False
    try:
        for path in kept.glob("*.safetensors"):
            with safe_open(path, "pt"):  # checks the header against the file's size
                pass
    except (OSError, SafetensorError):
        return False
    return True


def _has_wider_weights(directory: Path) -> bool:
    """Whether any weight is wider than bfloat16. Reads only the headers of the files."""
    from safetensors import safe_open

    config = Path(directory) / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        return False
    for pattern in WEIGHT_FILES:
        for path in Path(directory).glob(pattern):
            with safe_open(path, "pt") as file:
                if any(file.get_slice(name).get_dtype() in _WIDER for name in file.keys()):  # noqa: SIM118
                    return True
    return False


def _round_file(path: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            wider = file.get_slice(name).get_dtype() in _WIDER
            tensor = file.get_tensor(name)
            tensors[name] = stochastic_bfloat16(tensor, name) if wider else tensor
        save_file(tensors, target, metadata=file.metadata())


def _rewrite(path: Path, target: Path, change: Any) -> None:
    value = change(json.loads(path.read_text(encoding="utf-8")))
    target.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _with_bfloat16(config: Any) -> Any:
    """The config with all dtypes, also nested ones, set to bfloat16, the default of from_pretrained."""
    if not isinstance(config, dict):
        return config
    changed = {key: _with_bfloat16(value) for key, value in config.items()}
    return changed | {key: "bfloat16" for key in _DTYPE_KEYS if isinstance(config.get(key), str)}


def _without_sizes(index: dict[str, Any]) -> dict[str, Any]:
    """An index of weight shards without the sizes in its metadata, which rounding changed."""
    return {**index, "metadata": {}}
