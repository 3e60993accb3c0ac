"""Rates of known devices, for plans made before anything was measured; each was measured once.

A rate holds for one size of model. Another size takes time in proportion to its parameters, and between two
sizes that were measured the logarithm of the rate is interpolated. A test compares the figures with their
files in `benchmarks/results`; those of an 8B model are the geometric mean of the range that the paper's
authors report for one GH200 (docs/reference/method.md, section 7).
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_GH200 = "the paper's authors on a GH200"
_H100 = "benchmarks/results/h100.json"
_DEMO = "benchmarks/results/demo.json"

SMOLLM_135M, LLAMA_1B, LLAMA_8B = 134_515_008, 1_235_814_400, 8_030_261_248


@dataclass(frozen=True)
class Anchor:
    """A measured rate. rate : tokens a second (rewards: rows) for a model of this many parameters.

    startup : seconds to load, where they were measured apart.
    """

    parameters: int
    rate: float
    source: str
    startup: float = 0.0


@dataclass(frozen=True)
class KnownDevice:
    """A device with measured rates.

    match : part of its name in lower case. memory : bytes of a GPU; None for a CPU.
    rates : anchors by kind of work, ascending in parameters: `sample ENGINE`, `reward KIND`, `log-probs`,
        `log-probs fp32`, `train`.
    """

    name: str
    match: str
    memory: int | None
    rates: Mapping[str, Sequence[Anchor]]


KNOWN: Mapping[str, KnownDevice] = {
    "h100": KnownDevice(
        "H100",
        "h100",
        80 * 10**9,
        {
            "sample vllm": (
                Anchor(SMOLLM_135M, 11_787.0, _H100, startup=70.3),
                Anchor(LLAMA_8B, math.sqrt(6_000 * 10_000), _GH200, startup=70.3),
            ),
            "sample transformers": (Anchor(SMOLLM_135M, 3_333.5, _H100),),
            "log-probs": (Anchor(LLAMA_1B, 39_278.0, _H100),),
            "train": (Anchor(LLAMA_1B, 10_503.3, _H100),),
            "reward model": (Anchor(LLAMA_8B, math.sqrt(11 * 28), _GH200),),
        },
    ),
    "cpu": KnownDevice(
        "2 CPU cores",
        "cpu",
        None,
        {
            "sample vllm": (Anchor(SMOLLM_135M, 419.2, "benchmarks/results/vllm_sampling.json"),),
            "sample transformers": (Anchor(SMOLLM_135M, 160.9, _DEMO),),
            "log-probs": (Anchor(SMOLLM_135M, 337.2, "benchmarks/results/reference_logprobs.json"),),
            "log-probs fp32": (Anchor(SMOLLM_135M, 337.2, "benchmarks/results/reference_logprobs.json"),),
            "train": (Anchor(SMOLLM_135M, 325.7, "benchmarks/results/training_vs_trl.json"),),
            "reward sentiment": (Anchor(0, 4_520.0, _DEMO),),
            "reward code": (Anchor(0, 142.1, "benchmarks/results/code_reward.json"),),
        },
    ),
}

#: Seconds of stages that make one artifact, on two CPU cores (benchmarks/results/demo.json).
ARTIFACT_SECONDS: Mapping[str, float] = {
    "convert model": 24.9,
    "check rows": 0.2,
    "evaluate policy": 0.2,
    "write report": 1.2,
}
#: The others took less than 0.05 s there.
LEAST_SECONDS = 0.05


def device_here() -> KnownDevice:
    """The known device of this machine: that of its GPU by name, an H100 for another GPU, else the CPU."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.lower()
    except (OSError, subprocess.SubprocessError):
        return KNOWN["cpu"]
    return next((each for each in KNOWN.values() if each.match in name), KNOWN["h100"])


def rate_of(device: KnownDevice, work: str, parameters: int) -> Anchor | None:
    """The device's rate of a kind of work for a model of this size; None if none was measured."""
    anchors = device.rates.get(work)
    if not anchors:
        return None
    if parameters <= 0 or not anchors[0].parameters:
        return anchors[0]
    below = [each for each in anchors if each.parameters <= parameters]
    above = [each for each in anchors if each.parameters > parameters]
    if not below or not above:
        near = (above or below)[0 if above else -1]
        rate = near.rate * near.parameters / parameters
        return Anchor(parameters, rate, near.source, near.startup)
    low, high = below[-1], above[0]
    share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
    rate = math.exp((1 - share) * math.log(low.rate) + share * math.log(high.rate))
    sources = dict.fromkeys((low.source, high.source))
    return Anchor(parameters, rate, " and ".join(sources), max(low.startup, high.startup))
