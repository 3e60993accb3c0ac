"""What engines outside this process are asked and answer: seeds they take, rows that are checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qrpo_core.engines.base import Completion, FinishReason, SampleRequest, SamplingParams
from qrpo_core.errors import EngineError


def seed_of(seed: int) -> int:
    """A sample's seed (unsigned, 64 bits) as servers take it (signed): its lower 63 bits."""
    return seed % 2**63


def checked_completion(
    request: SampleRequest, ids: Sequence[int], logprobs: Sequence[float], params: SamplingParams
) -> Completion:
    """A drawn row: it ends with an end token or is as long as asked, and every token has a log-prob.

    Raises EngineError, naming the row.
    """
    tokens = tuple(int(token) for token in ids)
    reason: FinishReason = "stop" if tokens and tokens[-1] in params.stop_token_ids else "length"
    where = f"prompt {request.prompt_id}, sample {request.sample_index}"
    if reason == "length" and len(tokens) < params.max_new_tokens:
        raise EngineError(
            f"a completion ended after {len(tokens)} tokens of {params.max_new_tokens} without an end token",
            where=where,
        )
    if len(tokens) > params.max_new_tokens or not set(tokens[:-1]).isdisjoint(params.stop_token_ids):
        raise EngineError(f"a completion of {len(tokens)} tokens went on past its end", where=where)
    total = float(_checked(logprobs, len(tokens), where).sum())
    return Completion(request.prompt_id, request.sample_index, request.seed, tokens, reason, total)


def checked_scores(logprobs: Sequence[float], count: int, row: int) -> npt.NDArray[np.float64]:
    """Log-probs of a given completion of `count` tokens. Raises EngineError, naming the row."""
    return _checked(logprobs, count, f"row {row}")


def _checked(logprobs: Sequence[float], count: int, where: str) -> npt.NDArray[np.float64]:
    values = np.asarray(logprobs, dtype=np.float64)
    if values.shape != (count,):
        raise EngineError(f"{count} tokens and {values.size} log-probs", where=where)
    if not np.isfinite(values).all():
        wrong = values[~np.isfinite(values)][0]
        raise EngineError(
            f"a token's log-probability is {wrong}",
            where=where,
            remedy="the weights may be damaged, or their precision too low",
        )
    return values
