"""Rounding to bfloat16 that keeps what training did: at random, seeded by the weight's name.

A weight near 0.1 has a bfloat16 grid of 5e-4, and a training at the usual learning rates moves it by less.
The nearest grid value is then the one that it started from: at 1e-6 nine tenths of the training and more are
lost. Rounded up with the probability that the distance to the grid value below says, a weight is right in the
mean, and so are the log-probs (measured: benchmarks/results/saved_precision.json).
"""

from __future__ import annotations

import fcntl
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.errors import StoreError
from qrpo_core.ids import rounding_seed
from qrpo_core.policy import POLICY_FILES, WEIGHT_FILES, policy_digest
from qrpo_core.store.artifacts import cache_directory

if TYPE_CHECKING:
    import torch

#: Raised when a copy would come out otherwise; it stands in the copy's name.
VERSION = 1

_CHUNK = 1 << 24  # values rounded at a time, for the memory of it
_LOW_BITS = 1 << 16  # what float32 has beyond bfloat16
_WIDER = ("F64", "F32", "F16")  # as safetensors spells what bfloat16 does not hold
_DTYPE_KEYS = ("dtype", "torch_dtype")


def stochastic_bfloat16(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight in bfloat16, every value rounded up or down at random so that its mean is the value itself.

    name : seeds the draw. The same weight of two policies meets the same random numbers, so that where they
    are equal they stay equal, and where they differ a little they are rounded apart as seldom as they should.

    A value of the grid stays what it is, bit by bit; so do NaN and the infinities. What is finite stays so.
    """
    import torch

    generator = torch.Generator().manual_seed(rounding_seed(name))
    rounded = torch.empty(weight.numel(), dtype=torch.bfloat16)
    largest = torch.finfo(torch.bfloat16).max
    flat = weight.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        exact = flat[start : start + _CHUNK].to("cpu", torch.float32).contiguous()
        noise = torch.randint(0, _LOW_BITS, exact.shape, generator=generator, dtype=torch.int32)
        # In the bits of a float the next grid value away from 0 is 65536 further, whatever the exponent.
        noisy = ((exact.view(torch.int32) + noise) & -_LOW_BITS).view(torch.float32)
        kept = torch.where(exact.isfinite(), noisy.clamp(-largest, largest), exact)
        rounded[start : start + _CHUNK] = kept.bfloat16()
    return rounded.view(weight.shape)


def write_bfloat16(directory: Path, out: Path) -> None:
    """Write the policy of a directory with weights rounded by `stochastic_bfloat16`; the rest is copied.

    Only the files that make a policy (POLICY_FILES) are read. Weights go by their names in the files.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in _policy_files(directory):
        if path.suffix == ".safetensors":
            _round_file(path, out / path.name)
        elif path.name == "config.json":
            _rewrite(path, out / path.name, _says_bfloat16)
        elif path.name.endswith(".safetensors.index.json"):
            _rewrite(path, out / path.name, _without_sizes)
        else:
            shutil.copyfile(path, out / path.name)


def engine_directory(directory: Path, dtype: str) -> Path:
    """What an engine loads that computes in `dtype`: the directory, or its rounded copy in the cache.

    The copy is made where `dtype` is bfloat16 and the directory holds more than that; loading such a
    directory as bfloat16 would round to the nearest. It is made once a policy, by one run while others wait,
    and made again where files of it are gone. A model that is quantised already is loaded as it is.

    Raises StoreError where the cache cannot hold it.
    """
    from safetensors import SafetensorError

    if dtype != "bfloat16" or not _holds_more(directory):
        return directory
    kept = cache_directory() / "rounded" / f"{policy_digest(directory)}-bfloat16-{VERSION}"
    if not _whole(kept, directory):
        try:
            _make(directory, kept)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"cannot write the bfloat16 copy of a policy that the engine loads: {error}",
                where=str(kept),
                remedy="make room there, set QRPO_CACHE to another folder, or set model.dtype: float32",
            ) from None
    return kept


def _make(directory: Path, kept: Path) -> None:
    """Write a copy beside its place and rename it; what a killed run left there goes first."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}.part")
    with kept.with_name(f"{kept.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process
        if _whole(kept, directory):
            return
        for left in (part, kept):
            if left.exists():
                shutil.rmtree(left)
        try:
            write_bfloat16(directory, part)
            part.rename(kept)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _whole(kept: Path, directory: Path) -> bool:
    """Whether a copy has every file of its policy, and its weights all their bytes."""
    from safetensors import SafetensorError, safe_open

    if not kept.is_dir() or [path.name for path in _policy_files(kept)] != [
        path.name for path in _policy_files(directory)
    ]:
        return False
    try:
        for path in kept.glob("*.safetensors"):
            with safe_open(path, "pt"):  # compares what the head says with the size
                pass
    except (OSError, SafetensorError):
        return False
    return True


def _policy_files(directory: Path) -> list[Path]:
    names = (path for path in Path(directory).iterdir() if path.is_file())
    return sorted(path for path in names if any(fnmatch(path.name, pattern) for pattern in POLICY_FILES))


def _holds_more(directory: Path) -> bool:
    """Whether any weight is wider than bfloat16. Reads the heads of the files."""
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


def _says_bfloat16(config: Any) -> Any:
    """A config whose dtypes, also those of its parts, are bfloat16: what from_pretrained loads by default."""
    if not isinstance(config, dict):
        return config
    told = {key: _says_bfloat16(value) for key, value in config.items()}
    return told | {key: "bfloat16" for key in _DTYPE_KEYS if isinstance(config.get(key), str)}


def _without_sizes(index: dict[str, Any]) -> dict[str, Any]:
    """An index of shards; the sizes in its metadata are no longer true, and nobody needs them."""
    return {**index, "metadata": {}}
