"""How fast a kind of work goes: measured by a probe and kept in the store, or known of a device.

A probe's rate lies at ``rates/<kind>/<key>.json`` in the store. The key is a digest of what decides the
speed: the model's shape, and settings of the engine, the scorer or the trainer. A later probe replaces it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qrpo_core.common.errors import DamagedError, MissingError
from qrpo_core.common.hashing import canonical_json, digest_json
from qrpo_core.config import cache_key_fields
from qrpo_core.engines.kinds import kind_of
from qrpo_core.inspection.stage_work import StageWork
from qrpo_core.models.memory import ModelShape
from qrpo_core.rewards.registry import reward_identity
from qrpo_core.store.backends.interface import Objects

#: Settings of a training that decide the speed of a step, not its result.
_TRAINER = (
    *("precision", "lora_rank", "lora_base", "micro_batch_tokens", "activation_checkpointing", "compile"),
    *("processes", "parallel", "deepspeed", "save_dtype"),
)

#: Fields of a shape that a .gguf file and its converted model may give differently.
_NOT_SPEED = ("positions", "known", "qk_norm")


@dataclass(frozen=True)
class ProbedRate:
    """What a probe measured of one kind of work.

    startup : seconds before the first row: loading, and for training saving and comparing as well.
    row : seconds a row. prompt : seconds that each prompt takes besides, however many of its rows there are.
    tokens : mean tokens of a row; None where none are counted. rows : that were timed.
    device, created : where and on which day.
    """

    startup: float
    row: float
    rows: int
    device: str
    created: str
    tokens: float | None = None
    prompt: float = 0.0

    @property
    def source(self) -> str:
        """Where the rate is from, in words."""
        return f"probe of {self.created} on {self.device}"


def rate_key(work: StageWork, model: Mapping[str, Any]) -> str:
    """The object key of a work's rate. model : of `model_facts`."""
    experiment = work.experiment
    facts: dict[str, Any] = {"model": dict(model)}
    if work.kind == "sample":
        sampling = experiment.sampling
        facts |= {name: getattr(sampling, name) for name in ("engine", "max_new_tokens", "batch_size")}
        facts |= {"dtype": experiment.model.dtype, "batch_tokens": sampling.batch_tokens}
        facts |= kind_of(experiment).speed_settings(experiment)
    elif work.kind == "reward":
        scorer = work.scorer or experiment.reward
        facts = {"reward": reward_identity(scorer), "max_new_tokens": experiment.sampling.max_new_tokens}
    elif work.kind == "log-probs":
        facts |= {"precision": work.precision, "batch_tokens": experiment.sampling.batch_tokens}
    else:
        facts |= {name: getattr(experiment.training, name) for name in _TRAINER}
        facts |= {"weights": work.precision, "pairs": experiment.objective.pairwise}
    return f"rates/{work.kind}/{digest_json(facts)}.json"


def model_facts(shape: ModelShape | None, identity: Mapping[str, str]) -> dict[str, Any]:
    """What decides a model's speed: its shape; its identity where the layers have no formula."""
    if shape is None:
        return dict(identity)
    return {name: value for name, value in asdict(shape).items() if name not in _NOT_SPEED}


def read_rate(objects: Objects, key: str) -> ProbedRate | None:
    """The rate under an object key; None if no probe wrote one, DamagedError if it cannot be read."""
    try:
        return ProbedRate(**json.loads(objects.read(key)))
    except MissingError:
        return None
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"unreadable rate: {error}", where=f"{objects.url}/{key}", remedy="delete it, or probe again"
        ) from None


def write_rate(objects: Objects, key: str, rate: ProbedRate) -> None:
    """Keep a rate in the store, in place of an earlier one."""
    objects.write(key, canonical_json(asdict(rate)).encode())


def same_training(mine: StageWork, recipe: Mapping[str, Any]) -> bool:
    """Whether a stored training has the settings that decide the speed of a step. recipe : its `to_dict`."""
    stored, own = recipe["config"].get("training", {}), cache_key_fields(mine.experiment.training)
    names = [name for name in _TRAINER if name in own]
    objective = recipe["config"].get("objective", {}).get("kind")
    return objective == mine.experiment.objective.kind and all(stored.get(n) == own[n] for n in names)
