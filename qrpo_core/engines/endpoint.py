"""The engine that uses a running OpenAI-compatible server which takes and returns token ids (vLLM's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qrpo_core.common.errors import EngineError
from qrpo_core.common.http import JsonClient, ServiceError, Unavailable, check_service_url
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.engines import EndpointConfig
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.validation import (
    check_logprob_requests,
    check_samples,
    checked_completion,
    checked_logprobs,
    signed_seed,
)

_IDS_REMEDY = "use a server that returns token ids and their log-probs, such as vLLM's (return_token_ids)"

#: Sent with every request; a server would fill these from the model's generation_config or its own settings.
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


class EndpointEngine(Engine):
    """Draws from and scores with the policy that a server has loaded.

    Parameters
    ----------
    config : the server's address and limits.
    vocab_size, max_length : of the policy, in tokens. If the server's limit is shorter, `max_length` of the
        engine is that limit.

    Each row is a request. Only the comparison with the training model (`parity`) shows whether the server has
    the right weights and returns log-probs at temperature 1 (vLLM's default logprobs_mode). Raises
    EngineError for answers that do not match the request. `exact` is False.
    """

    exact = False

    def __init__(self, config: EndpointConfig, *, vocab_size: int, max_length: int) -> None:
        self._config = config
        self._closed = False
        self._url = check_service_url(config.url, "endpoint.url", config.key_variable)
        model = self._served()
        self._model = str(model["id"])
        self._vocab_size = vocab_size
        self.max_length = min(max_length, model.get("max_model_len") or max_length)
        self.name = f"endpoint/{self._model}"

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        """One completion for each request, in their order.

        Raises EngineError for a prompt that leaves no room for `max_new_tokens`; prompts are never cut.
        """
        self._check_open()
        check_samples(requests, params, vocab_size=self._vocab_size, max_length=self.max_length)
        client = self._client()

        async def ask(row: int) -> Completion:
            request = requests[row]
            choice = await self._complete(
                client,
                list(request.prompt_token_ids),
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_new_tokens,
                stop_token_ids=list(params.stop_token_ids),
                seed=signed_seed(request.seed),
            )
            ids, logprobs = _drawn(choice, client.url)
            return checked_completion(request, ids, logprobs, params)

        return client.map(ask, len(requests), progress)

    def token_logprobs(
        self,
        sequences: Sequence[LogprobRequest],
        progress: Progress = no_progress,
        temperature: float = 1.0,
    ) -> list[npt.NDArray[np.float64]]:
        """log pi(token | preceding tokens) in nats, an array for each completion.

        Uses vLLM's prompt_logprobs; raises EngineError if the server does not offer them.
        """
        self._check_open()
        check_logprob_requests(
            sequences,
            vocab_size=self._vocab_size,
            max_length=self.max_length,
            temperature=temperature,
            only_at_1=True,
        )
        client = self._client()

        async def ask(row: int) -> npt.NDArray[np.float64]:
            prompt, ids = list(sequences[row].prompt_token_ids), list(sequences[row].token_ids)
            if not ids:
                return np.zeros(0)
            # The last token is "drawn" with only itself allowed, so that sequences of full length fit.
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
            return checked_logprobs([*scores, *logprobs], len(ids), row)

        return client.map(ask, len(sequences), progress)

    def close(self) -> None:
        """Refuse further calls; the server keeps running."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="make a new one")

    def _client(self) -> JsonClient:
        config = self._config
        return JsonClient(
            self._url,
            key_variable=config.key_variable,
            timeout=config.timeout_seconds,
            retry_seconds=config.retry_seconds,
            concurrency=config.concurrency,
        )

    async def _request(
        self, client: JsonClient, method: str, path: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The JSON object that the server answers. Raises EngineError with the remedy."""
        try:
            return await client.request(method, path, body)
        except ServiceError as error:
            variable = self._config.key_variable
            remedies = {
                400: "the server does not support the request; vLLM's server does",
                401: f"set the environment variable {variable} to the server's key",
                402: "see that the account has funds left, then run again",
                403: f"set {variable} to a key that may do this",
                404: "look at endpoint.url (it ends with /v1) and endpoint.model",
            }
            away = isinstance(error, Unavailable)
            remedy = "look at endpoint.url"
            if away:
                remedy = (
                    "see that the server runs and is not overloaded (endpoint.concurrency, "
                    "endpoint.timeout_seconds, endpoint.retry_seconds), then run again"
                )
            raise EngineError(
                f"no answer after {error.tries} tries: {error}" if away else str(error),
                where=f"{client.url}/{path}",
                remedy=remedies.get(error.status, remedy),
            ) from None

    def _served(self) -> dict[str, Any]:
        """The server's entry for the model `config.model`, or for its only model."""
        client = self._client()

        async def ask(row: int) -> dict[str, Any]:
            return await self._request(client, "GET", "models")

        (answer,) = client.map(ask, 1, no_progress)
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

    async def _complete(self, client: JsonClient, prompt: list[int], **settings: Any) -> dict[str, Any]:
        """The only choice of a completion request."""
        body = {"model": self._model, "prompt": prompt, **_PLAIN, **settings}
        answer = await self._request(client, "POST", "completions", body)
        try:
            (choice,) = answer["choices"]
            read = choice.get("prompt_token_ids", prompt)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise EngineError("no completion in the answer", where=client.url, remedy=_IDS_REMEDY) from None
        if read is not None and list(read) != prompt:
            raise EngineError(
                f"the server read other prompt tokens ({len(read)}) than were sent ({len(prompt)})",
                where=client.url,
                remedy="use a server that takes token ids unchanged",
            )
        return dict(choice)


def _drawn(choice: dict[str, Any], url: str) -> tuple[list[int], list[float]]:
    """Token ids of a choice and their log-probs. Raises EngineError if the server returns none."""
    try:
        ids = [int(token) for token in choice["token_ids"]]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    except (KeyError, TypeError, ValueError):
        raise EngineError(
            "the server returns no token ids or no log-probs", where=url, remedy=_IDS_REMEDY
        ) from None
    return ids, logprobs
