"""The kinds of engines: what the project knows of each before one is made.

A kind is one object; the rest of the project asks it and compares no names. Nothing here imports torch or
vLLM before an engine is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.engines.batching import positions_for, slots_for

if TYPE_CHECKING:
    from qrpo_core.config import Experiment
    from qrpo_core.engines.base import Engine
    from qrpo_core.models.chat import Chat
    from qrpo_core.models.memory import ModelShape


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is made for.

    directory : of the policy. chat : its vocabulary, end tokens and longest sequence.
    precision : None, or the arithmetic of log-probs that are compared with the trainer's ("bf16", "fp32");
        asked of `TRAINERS` alone.
    adapters : LoRA adapters for the directory's weights; asked only of a kind that takes them `unmerged`.
    """

    experiment: Experiment
    directory: Path
    chat: Chat
    precision: str | None = None
    adapters: Path | None = None


@dataclass(frozen=True)
class EngineKind(ABC):
    """One kind of engine. A subclass defines `make`, and what of the rest is not so for it.

    name : in the configuration.
    loads_policy : whether the policy's weights lie in this machine's memory.
    draws_from_policy : if not, its rows are never taken for a policy's.
    reference_only : whether it has the reference policy and none that was trained.
    slow_start : whether it takes a minute to start: the trial of a reward does not close it then.
    memory_remedies : settings that lower `memory`.
    """

    name: str
    loads_policy: bool = True
    draws_from_policy: bool = True
    reference_only: bool = False
    slow_start: bool = False
    memory_remedies: tuple[str, ...] = ()

    @abstractmethod
    def make(self, asked: EngineRequest) -> Engine:
        """An engine for a policy."""

    def require(self, experiment: Experiment) -> None:
        """Raise ConfigError if the engine lacks something. Starts no engine and sends no request."""
        return

    def longest(self, experiment: Experiment, own: int) -> int:
        """The longest sequence (prompt and completion) that it takes, in tokens. own : the model's limit."""
        return own

    def at_once(self, experiment: Experiment) -> int:
        """Rows that are drawn at the same time."""
        return slots_for(positions_for(experiment.sampling.max_new_tokens))

    def unmerged(self, experiment: Experiment) -> bool:
        """Whether it takes a LoRA policy as adapters beside the weights that they belong to."""
        return False

    def quantization(self, experiment: Experiment) -> str | None:
        """What it makes of the weights, such as fp8: its rows are those of another policy then."""
        return None

    def arithmetic(self, dtype: str) -> str:
        """The dtype in which it multiplies weights of `dtype` here."""
        from qrpo_core.models.precision import compute_dtype, dtype_name, pick_device

        return dtype_name(compute_dtype(dtype, pick_device()))

    def server(self, experiment: Experiment) -> list[str | None] | None:
        """The address and the model of the server behind it; None where it computes here."""
        return None

    def speed_settings(self, experiment: Experiment) -> dict[str, Any]:
        """Settings of its own that decide its speed, JSON-ready."""
        return {}

    def gpus(self, experiment: Experiment, visible: Sequence[str] | None = None) -> int:
        """GPUs that it holds. visible : those to choose from; None for this machine's."""
        return int(self.loads_policy)

    def gpus_of_a_copy(self, experiment: Experiment) -> int:
        """GPUs that share one copy of the weights."""
        return 1

    def memory(self, experiment: Experiment, shape: ModelShape, item: int) -> Mapping[str, int]:
        """Bytes on each GPU by what needs them, with one row. item : bytes of a number."""
        row = shape.cache_bytes(experiment.sampling.max_new_tokens, item)
        return {"weights": item * shape.parameters, "cache of a row": row}

    def memory_fraction(self, experiment: Experiment) -> float:
        """The fraction of a GPU's memory that it may use."""
        return 1.0


class _Transformers(EngineKind):
    def make(self, asked: EngineRequest) -> Engine:
        from qrpo_core.engines.transformers import TransformersEngine

        sampling, dtype = asked.experiment.sampling, asked.experiment.model.dtype
        return TransformersEngine(
            asked.directory, dtype, sampling.batch_size, asked.precision, batch_tokens=sampling.batch_tokens
        )


class _Vllm(EngineKind):
    def make(self, asked: EngineRequest) -> Engine:
        from qrpo_core.engines.vllm import VllmEngine

        experiment = asked.experiment
        return VllmEngine(asked.directory, experiment.model.dtype, experiment.vllm, adapters=asked.adapters)

    def require(self, experiment: Experiment) -> None:
        from qrpo_core.engines.vllm_setup import require

        require(experiment.vllm)

    def longest(self, experiment: Experiment, own: int) -> int:
        return min(own, experiment.vllm.max_length or own)

    def unmerged(self, experiment: Experiment) -> bool:
        return not experiment.vllm.merged

    def quantization(self, experiment: Experiment) -> str | None:
        return experiment.vllm.quantization

    def arithmetic(self, dtype: str) -> str:
        from qrpo_core.engines.vllm_setup import compute_dtype_name

        return compute_dtype_name(dtype)

    def speed_settings(self, experiment: Experiment) -> dict[str, Any]:
        return {"vllm": experiment.vllm.model_dump(mode="json")}

    def gpus(self, experiment: Experiment, visible: Sequence[str] | None = None) -> int:
        """GPUs of all engines; where no GPU is visible, the number in the experiment."""
        from qrpo_core.engines.vllm_setup import gpu_groups, visible_gpus

        config = experiment.vllm
        named = (config.engines or 1) * config.tensor_parallel_size
        try:
            groups = gpu_groups(config, visible_gpus() if visible is None else visible)
        except ConfigError:  # starting the engine raises it
            return named
        return sum(map(len, groups)) or named

    def gpus_of_a_copy(self, experiment: Experiment) -> int:
        return experiment.vllm.tensor_parallel_size

    def memory(self, experiment: Experiment, shape: ModelShape, item: int) -> Mapping[str, int]:
        config, gpus = experiment.vllm, experiment.vllm.tensor_parallel_size
        weights = (1 if config.quantization else item) * shape.parameters
        row = shape.cache_bytes(config.max_length or shape.positions, item)
        return {"weights": weights // gpus, "cache of the longest row": row // gpus}

    def memory_fraction(self, experiment: Experiment) -> float:
        return experiment.vllm.gpu_memory_fraction


class _Endpoint(EngineKind):
    def make(self, asked: EngineRequest) -> Engine:
        from qrpo_core.engines.endpoint import EndpointEngine

        chat = asked.chat
        return EndpointEngine(
            asked.experiment.endpoint, vocab_size=chat.vocab_size, max_length=chat.max_length
        )

    def require(self, experiment: Experiment) -> None:
        from qrpo_core.common.http import check_service_url

        check_service_url(experiment.endpoint.url, "endpoint.url", experiment.endpoint.key_variable)

    def longest(self, experiment: Experiment, own: int) -> int:
        """The server's limit, or `own` if it does not answer now, since the engine asks it again."""
        from qrpo_core.engines.endpoint import EndpointEngine

        try:
            return EndpointEngine(experiment.endpoint, vocab_size=1, max_length=own).max_length
        except EngineError:
            return own

    def at_once(self, experiment: Experiment) -> int:
        return experiment.endpoint.concurrency

    def server(self, experiment: Experiment) -> list[str | None] | None:
        return [experiment.endpoint.url, experiment.endpoint.model]


class _Fake(EngineKind):
    def make(self, asked: EngineRequest) -> Engine:
        from qrpo_core.engines.fake import FakeEngine

        chat, seconds = asked.chat, asked.experiment.fake.seconds_per_row
        return FakeEngine(
            chat.vocab_size, chat.stop_token_ids, max_length=chat.max_length, seconds_per_row=seconds
        )

    def at_once(self, experiment: Experiment) -> int:
        return 1


#: The engine with the trainer's own numerics: it scores log-probs, whichever engine drew the rows.
TRAINERS: EngineKind = _Transformers("transformers")

KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        TRAINERS,
        _Vllm(
            "vllm",
            slow_start=True,
            memory_remedies=(
                "vllm.max_length to the longest row",
                "vllm.tensor_parallel_size to more GPUs",
            ),
        ),
        _Endpoint("endpoint", loads_policy=False, reference_only=True),
        _Fake("fake", loads_policy=False, draws_from_policy=False),
    )
}


def kind_of(experiment: Experiment) -> EngineKind:
    """The kind of the experiment's sampling engine."""
    return KINDS[experiment.sampling.engine]
