"""The engine that asks a running OpenAI-compatible server: vLLM's, which takes and gives token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo_core.engines.answers import checked_completion, checked_scores, seed_of
from qrpo_core.engines.base import (
    Completion,
    Progress,
    SampleRequest,
    SamplingParams,
    ScoreRequest,
    no_progress,
)
from qrpo_core.engines.batching import check_samples, check_scores
from qrpo_core.engines.config import EndpointConfig
from qrpo_core.engines.endpoint_client import Client, ask_all, run
from qrpo_core.errors import EngineError

_IDS_REMEDY = "use a server that returns token ids and their log-probs, such as vLLM's (return_token_ids)"

#: What a server would otherwise take from the model's generation_config or its own settings.
_PLAIN = {
    "n": 1,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "watermarking": False,
    "ignore_eos": True,  # the model's end tokens are among stop_token_ids
    "add_special_tokens": False,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "logprobs": 0,  # of the drawn token alone
}


class EndpointEngine:
    """Draws from and scores with the policy that a server has loaded.

    Parameters
    ----------
    config : where the server is, and how hard it may be asked.
    vocab_size, max_length : of the policy, in tokens; a shorter limit of the server's counts, and is the
        engine's own `max_length`.

    One request a row, `concurrency` at a time. That the server has the right weights, and gives log-probs at
    temperature 1 (vLLM's default logprobs_mode), only the comparison with the training model can tell.
    Raises EngineError for answers that are not what was asked. `exact` is False.
    """

    exact = False

    def __init__(self, config: EndpointConfig, *, vocab_size: int, max_length: int) -> None:
        self._config = config
        self._closed = False
        model = self._served()
        self._model = str(model["id"])
        self._vocab_size = vocab_size
        self.max_length = min(max_length, model.get("max_model_len") or max_length)
        self.name = f"endpoint/{self._model}"

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion a request, in the order of the requests.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens` (it is never cut).
        """
        self._check_open()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self.max_length)
        client = Client(self._config)

        async def ask(row: int) -> Completion:
            request = requests[row]
            choice = await self._complete(
                client,
                list(request.prompt_token_ids),
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_new_tokens,
                stop_token_ids=list(params.stop_token_ids),
                seed=seed_of(request.seed),
            )
            ids, logprobs = _drawn(choice, client.url)
            return checked_completion(request, ids, logprobs, params)

        return run(ask_all(client, len(requests), self._config.concurrency, ask, progress))

    def logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> npt.NDArray[np.float64]:
        """log pi(completion | prompt) in nats, [sequences]; see `token_logprobs`."""
        rows = self.token_logprobs(sequences, progress, temperature)
        return np.array([scores.sum() for scores in rows], np.float64)

    def token_logprobs(
        self,
        sequences: Sequence[ScoreRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | what is before it) of every token of every completion, in nats.

        Through vLLM's prompt_logprobs; raises EngineError where the server does not offer them.
        """
        self._check_open()
        check_scores(
            sequences,
            vocab_size=self._vocab_size,
            max_length=self.max_length,
            temperature=temperature,
            only_at_1=True,
        )
        client = Client(self._config)

        async def ask(row: int) -> npt.NDArray[np.float64]:
            prompt, ids = list(sequences[row].prompt_token_ids), list(sequences[row].token_ids)
            if not ids:
                return np.zeros(0)
            # The last token is "drawn" with no other allowed, so that the longest sequences fit as well.
            extra = {"prompt_logprobs": 0} if len(ids) > 1 else {}
            choice = await self._complete(
                client,
                prompt + ids[:-1],
                temperature=1.0,
                top_p=1.0,
                max_tokens=1,
                allowed_token_ids=ids[-1:],
                **extra,
            )
            last, logprobs = _drawn(choice, client.url)
            places = (choice.get("prompt_logprobs") or [])[len(prompt) :]
            if last != ids[-1:] or len(places) != len(ids) - 1:
                raise EngineError(
                    "the server scores no given tokens",
                    where=client.url,
                    remedy="use vLLM's server (prompt_logprobs), or the engine transformers for log-probs",
                )
            scores = [float(place[str(i)]["logprob"]) for i, place in zip(ids[:-1], places, strict=True)]
            return checked_scores([*scores, *logprobs], len(ids), row)

        return run(ask_all(client, len(sequences), self._config.concurrency, ask, progress))

    def close(self) -> None:
        """The engine is of no use afterwards; the server stays as it is."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="make a new one")

    def _served(self) -> dict[str, Any]:
        """The entry of the served model that `config.model` names, or of the only one."""
        client = Client(self._config)

        async def ask(row: int) -> dict[str, Any]:
            return await client.ask("GET", "/models")

        answer = run(ask_all(client, 1, 1, ask, no_progress))[0]
        where = f"{client.url}/models"
        try:
            models = {str(entry["id"]): dict(entry) for entry in answer["data"]}
        except (KeyError, TypeError, ValueError):
            raise EngineError("no list of models", where=where, remedy="look at endpoint.url") from None
        wanted = self._config.model
        if wanted is None and len(models) == 1:
            return next(iter(models.values()))
        if wanted is None or wanted not in models:
            serves = ", ".join(map(repr, sorted(models))) or "none"
            what = f"endpoint.model is {wanted!r}" if wanted else f"it serves {len(models)} models"
            raise EngineError(
                what, where=where, remedy=f"set endpoint.model to one of those it serves: {serves}"
            )
        return models[wanted]

    async def _complete(self, client: Client, prompt: list[int], **settings: Any) -> dict[str, Any]:
        """The one choice of a completion request."""
        body = {"model": self._model, "prompt": prompt, **_PLAIN, **settings}
        answer = await client.ask("POST", "/completions", body)
        try:
            (choice,) = answer["choices"]
            read = choice.get("prompt_token_ids", prompt)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise EngineError("no completion in the answer", where=client.url, remedy=_IDS_REMEDY) from None
        if read is not None and list(read) != prompt:
            raise EngineError(
                f"the server read {len(read)} prompt tokens where {len(prompt)} were sent, or other ones",
                where=client.url,
                remedy="it must take token ids as they are",
            )
        return dict(choice)


def _drawn(choice: dict[str, Any], url: str) -> tuple[list[int], list[float]]:
    """Token ids of a choice and the log-prob of each. Raises EngineError where the server gives none."""
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    except (KeyError, TypeError, ValueError):
        raise EngineError(
            "the server gives no token ids or no log-probs", where=url, remedy=_IDS_REMEDY
        ) from None
    return ids, logprobs
