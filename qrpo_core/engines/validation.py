"""Checks of requests to engines, and of answers from engines outside this process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import EngineError
from qrpo_core.engines.base import Completion, FinishReason, LogprobRequest, SampleRequest, SamplingParams


def check_samples(
    requests: Sequence[SampleRequest], params: SamplingParams, *, vocab_size: int, max_length: int | None
) -> None:
    """Raise EngineError for settings, tokens or lengths that the model cannot sample; nothing is cut."""
    if not params.temperature > 0 or not 0 < params.top_p <= 1 or params.max_new_tokens < 1:
        raise EngineError(
            f"temperature {params.temperature} must be > 0, top_p {params.top_p} in (0, 1], "
            f"max_new_tokens {params.max_new_tokens} >= 1"
        )
    checked: set[tuple[int, ...]] = set()
    for request in requests:
        if request.prompt_token_ids in checked:
            continue
        where = f"prompt {request.prompt_id}"
        _check_tokens(request.prompt_token_ids, vocab_size, where)
        length = len(request.prompt_token_ids)
        if max_length is not None and length + params.max_new_tokens > max_length:
            raise EngineError(
                f"a prompt of {length} tokens and {params.max_new_tokens} new ones exceed the model's "
                f"{max_length}",
                where=where,
                remedy="lower sampling.max_new_tokens or remove the prompt; prompts are never cut",
            )
        checked.add(request.prompt_token_ids)


def check_logprob_requests(
    sequences: Sequence[LogprobRequest],
    *,
    vocab_size: int,
    max_length: int | None,
    temperature: float = 1.0,
    only_at_1: bool = False,
) -> None:
    """Raise EngineError, naming the row, for sequences whose log-probs the model cannot compute.

    only_at_1 : whether the engine computes log-probs only at temperature 1.
    """
    if not 0 < temperature < math.inf:
        raise EngineError(f"temperature {temperature} must be finite and above 0")
    if only_at_1 and temperature != 1:
        raise EngineError(
            f"this engine gives log-probs at temperature 1, not {temperature:g}",
            remedy="compute them with the engine transformers",
        )
    for row, sequence in enumerate(sequences):
        _check_tokens(sequence.prompt_token_ids, vocab_size, f"row {row}")
        if sequence.token_ids:
            _check_tokens(sequence.token_ids, vocab_size, f"row {row}")
        length = len(sequence.prompt_token_ids) + len(sequence.token_ids)
        if max_length is not None and length > max_length:
            raise EngineError(
                f"a sequence of {length} tokens exceeds the model's {max_length}",
                where=f"row {row}",
                remedy="remove it; sequences are never cut",
            )


def _check_tokens(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    if not ids:
        raise EngineError("an empty prompt", where=where, remedy="a prompt has at least one token")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise EngineError(f"token id {wrong} is outside the vocabulary of {vocab_size}", where=where)


def signed_seed(seed: int) -> int:
    """The lower 63 bits of a 64-bit seed: vLLM and other servers take signed integers."""
    return seed % 2**63


def checked_completion(
    request: SampleRequest, ids: Sequence[int], logprobs: Sequence[float], params: SamplingParams
) -> Completion:
    """The completion of a request. It ends with an end token or at the limit, and every token has a log-prob.

    Raises EngineError, naming the row, if that does not hold.
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


def checked_logprobs(logprobs: Sequence[float], count: int, row: int) -> npt.NDArray[np.float64]:
    """The log-probs of a completion of `count` tokens. Raises EngineError, naming the row."""
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
