"""The engines that the contract is tested on, their small models, and questions to all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qrpo_core.config.engines import EndpointConfig
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest
from qrpo_core.engines.endpoint import EndpointEngine
from qrpo_core.engines.fake import FakeEngine
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.engines.vllm import VllmEngine
from qrpo_core.models.chat import Chat
from qrpo_core.models.precision import pick_device
from tests.rounding import reordered
from tests.vllm import shared as vllm

Floats = npt.NDArray[np.float64]

#: Positions of the small models.
MAX_LENGTH = 512


@dataclass(frozen=True)
class Case:
    """An engine under test.

    tolerance : nats a sequence between sample() and logprobs().
    exact : what the engine must say of itself. Where it is False, the law is not tested, and draws that the
        law makes equal may differ in one row of ten (last digits decide such a row).
    draws : samples that a distribution is judged by.
    """

    make: Callable[[int], Engine]
    vocab_size: int
    stops: tuple[int, ...]
    tolerance: float
    exact: bool = True
    draws: int = 2000

    def agree(self, one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> bool:
        """Whether rows of tokens are equal, all or nearly all."""
        assert len(one) == len(other)
        differing = sum(a != b for a, b in zip(one, other, strict=True))
        return differing == 0 if self.exact else differing <= len(one) / 10


def case_of(kind: str, directory: Path) -> Case:
    """The engine `fake`, or `transformers-DTYPE` with the model of a directory."""
    chat = Chat.load(directory)
    if kind == "fake":

        def fake(batch_size: int) -> Engine:
            return FakeEngine(chat.vocab_size, chat.stop_token_ids, max_length=MAX_LENGTH)

        return Case(fake, chat.vocab_size, chat.stop_token_ids, 1e-12)
    dtype = kind.removeprefix("transformers-")

    def real(batch_size: int) -> Engine:
        return TransformersEngine(directory, dtype, batch_size)

    # bfloat16 has 8 bits: a logit of 8 is known to 1/32. Where it is not native, arithmetic is float32: 2,000
    # operations to each log-prob of at most 40 tokens.
    exact = 40 * math.log(chat.vocab_size) * reordered(2_000)
    tolerance = 1.0 if real(1).name.endswith("bfloat16") else exact
    return Case(real, chat.vocab_size, chat.stop_token_ids, tolerance, exact=pick_device().type == "cpu")


@contextmanager
def vllm_case(model: Path) -> Iterator[Case]:
    """One process of vLLM for all tests, since it takes long to start; another one once that is closed."""
    chat = Chat.load(model)
    engines: list[Engine] = []

    def shared(batch_size: int) -> Engine:
        if not engines or engines[-1]._closed:  # type: ignore[attr-defined]
            engines.append(VllmEngine(model, "float32", vllm.CONFIG))
        return engines[-1]

    try:
        yield Case(shared, chat.vocab_size, chat.stop_token_ids, 1e-3, exact=False)
    finally:
        for engine in engines:
            engine.close()


@contextmanager
def endpoint_case(model: Path) -> Iterator[Case]:
    """vLLM's own server of the model; every engine is a new client."""
    chat = Chat.load(model)
    with vllm.server(model, "--dtype", "float32", "--served-model-name", "tiny") as url:

        def client(batch_size: int) -> Engine:
            config = EndpointConfig(url=url, concurrency=batch_size, retry_seconds=0)
            made = EndpointEngine(config, vocab_size=chat.vocab_size, max_length=chat.max_length)
            assert made.name == "endpoint/tiny"
            return made

        yield Case(client, chat.vocab_size, chat.stop_token_ids, 1e-3, exact=False, draws=400)


def scores(requests: list[SampleRequest], drawn: list[Completion]) -> list[LogprobRequest]:
    """What was drawn, to be scored."""
    return [LogprobRequest(r.prompt_token_ids, c.token_ids) for r, c in zip(requests, drawn, strict=True)]


def next_token_logprobs(engine: Engine, case: Case, prompt: tuple[int, ...]) -> Floats:
    """log-probability of every token of the vocabulary after a prompt, [vocab_size]."""
    return engine.logprobs([LogprobRequest(prompt, (token,)) for token in range(case.vocab_size)])


def probabilities(logprobs: Floats, temperature: float, top_p: float) -> Floats:
    """What one token is drawn with, [vocab_size], computed plainly from log-probs at temperature 1."""
    weights: Floats = np.exp(logprobs / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights)
    reached = np.cumsum(weights[order]) - weights[order]
    weights[order[reached >= top_p]] = 0.0
    return weights / weights.sum()
