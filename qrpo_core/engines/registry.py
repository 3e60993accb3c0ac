"""Engines by name. Heavy imports happen here, when an engine is made, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qrpo_core.errors import EngineError

if TYPE_CHECKING:
    from qrpo_core.data.chat import Chat
    from qrpo_core.engines.base import Engine

KINDS = ("transformers", "fake")


def make_engine(
    kind: str,
    directory: Path,
    *,
    dtype: str,
    batch_size: int,
    chat: Chat,
    precision: str | None = None,
) -> Engine:
    """The engine of a kind for a policy's directory.

    dtype : "bfloat16" or "float32", of the weights drawn from.
    precision : None, or the trainer's arithmetic ("bf16", "fp32"), for log-probs to compare with its own.
    chat : gives the fake engine its vocabulary, end tokens and longest sequence; it needs no weights.
    """
    if kind == "fake":
        from qrpo_core.engines.fake import FakeEngine

        return FakeEngine(chat.vocab_size, chat.stop_token_ids, max_length=chat.max_length)
    if kind == "transformers":
        from qrpo_core.engines.hf import TransformersEngine

        return TransformersEngine(directory, dtype, batch_size, precision)
    raise EngineError(f"unknown engine {kind!r}", remedy=f"one of {', '.join(KINDS)}")
