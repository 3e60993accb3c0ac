"""Engines by name. Heavy imports happen here, when an engine is made, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qrpo_core.engines.config import EndpointConfig, FakeConfig, VllmConfig
from qrpo_core.errors import EngineError

if TYPE_CHECKING:
    from qrpo_core.config import Experiment
    from qrpo_core.data.chat import Chat
    from qrpo_core.engines.base import Engine

KINDS = ("transformers", "vllm", "endpoint", "fake")


def require(experiment: Experiment) -> None:
    """Raise ConfigError where the engine that draws lacks what it needs: vLLM, GPUs, the URL of a server.

    No engine is started and no server is asked.
    """
    if experiment.sampling.engine == "vllm":
        from qrpo_core.engines.vllm_setup import require as require_vllm

        require_vllm(experiment.vllm)
    elif experiment.sampling.engine == "endpoint":
        from qrpo_core.engines.endpoint_client import base_url

        base_url(experiment.endpoint)


def longest_sequence(experiment: Experiment, own: int) -> int:
    """Prompt and completion together that the engine that draws takes, in tokens. own : what the model takes.

    A server that does not answer now is taken to hold the model's own length: the engine asks it again.
    """
    if experiment.sampling.engine == "vllm":
        return min(own, experiment.vllm.max_length or own)
    if experiment.sampling.engine == "endpoint":
        from qrpo_core.engines.endpoint import EndpointEngine

        try:
            return EndpointEngine(experiment.endpoint, vocab_size=1, max_length=own).max_length
        except EngineError:
            return own
    return own


def make_engine(
    kind: str,
    directory: Path,
    *,
    dtype: str,
    batch_size: int,
    batch_tokens: int = 16384,
    chat: Chat,
    precision: str | None = None,
    vllm: VllmConfig | None = None,
    endpoint: EndpointConfig | None = None,
    fake: FakeConfig | None = None,
    adapters: Path | None = None,
) -> Engine:
    """The engine of a kind for a policy's directory.

    dtype : "bfloat16" or "float32", of the weights drawn from.
    precision : None, or the trainer's arithmetic ("bf16", "fp32"), for log-probs to compare with its own.
    chat : gives the fake engine its vocabulary, end tokens and longest sequence; it needs no weights. The
        endpoint has the last two from it as well.
    vllm, endpoint, fake : the experiment's; None for the defaults.
    adapters : LoRA adapters that stand beside the directory's weights; only vllm uses them unmerged.
    """
    if adapters is not None and kind != "vllm":
        raise EngineError(
            f"the engine {kind} uses no adapters", where=str(adapters), remedy="give the merged policy"
        )
    if kind == "fake":
        from qrpo_core.engines.fake import FakeEngine

        return FakeEngine(
            chat.vocab_size,
            chat.stop_token_ids,
            max_length=chat.max_length,
            seconds_per_row=(fake or FakeConfig()).seconds_per_row,
        )
    if kind == "transformers":
        from qrpo_core.engines.hf import TransformersEngine

        return TransformersEngine(directory, dtype, batch_size, precision, batch_tokens=batch_tokens)
    if kind == "vllm":
        from qrpo_core.engines.vllm import VllmEngine

        return VllmEngine(directory, dtype, vllm or VllmConfig(), adapters=adapters)
    if kind == "endpoint":
        from qrpo_core.engines.endpoint import EndpointEngine

        served = endpoint or EndpointConfig()
        return EndpointEngine(served, vocab_size=chat.vocab_size, max_length=chat.max_length)
    raise EngineError(f"unknown engine {kind!r}", remedy=f"one of {', '.join(KINDS)}")
