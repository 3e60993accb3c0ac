"""The base of rewards that ask a language model behind an OpenAI-compatible endpoint about each row."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from qrpo_core.common.errors import EngineError
from qrpo_core.common.http import JsonClient, RateLimit, Refused, Unavailable, check_service_url
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.judge_rewards import EndpointSettings
from qrpo_core.rewards.base import RewardRequest, RowReward, Score, clip, guarded, refuse

#: Messages of services about a request that is too long for their model.
_TOO_LONG = re.compile(
    r"context (?:length|window|size)|maximum model length|too long|too many (?:input |prompt )?tokens|"
    r"reduce the length|(?:exceed|larger|longer)\w* .{0,40}tokens?\b",
    re.IGNORECASE | re.DOTALL,
)
#: The run ends after this many consecutive rows without an answer (plus `concurrency`): the judge is down.
_FAILED_IN_A_ROW = 32


class EndpointReward(RowReward):
    """Asks the endpoint about each row; a subclass writes the question and reads the answer.

    section : of the settings in the experiment, for messages. model : name of the judge.

    Statuses beside those of the subclass:

    too_long : the request is too long for the judge.
    endpoint_error : no answer within `retry_seconds`.
    refused : the endpoint refuses this row, but answers others.

    Raises ConfigError for a URL that is not an http address.
    """

    #: What to look at where the endpoint refuses every request.
    _wrong_settings = "see reward.judge: url, model, max_completion_tokens, temperature, top_logprobs"

    def __init__(self, settings: EndpointSettings, section: str, model: str) -> None:
        self._settings, self._section, self._model = settings, section, model
        self._url = check_service_url(settings.url, f"{section}.url", settings.key_variable)
        self._rate_limit = RateLimit(settings.requests_per_minute)
        self._unanswered = 0  # consecutive rows, also over blocks: a block can hold fewer than the limit

    @abstractmethod
    def _body(self, request: RewardRequest) -> dict[str, Any]:
        """Return the request about a row; may raise, and the row then has the status `parse_error`."""

    @abstractmethod
    def _probe(self) -> dict[str, Any]:
        """Return a harmless request with the same settings."""

    @abstractmethod
    def _check(self, reply: dict[str, Any]) -> None:
        """Raise EngineError for a reply that lacks what every answer must have."""

    @abstractmethod
    def _read(self, request: RewardRequest, reply: dict[str, Any]) -> float | Score:
        """Return the reward that an answer states, or a `Score` that says why it has none. May raise."""

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests. `concurrency` requests run at a time.

        Raises EngineError if the endpoint refuses every request (its address, model, key or settings are
        wrong), gives no log-probabilities where they are read, or leaves many consecutive rows without an
        answer.
        """
        refuse(self, ((request.prompt_id, request.ground_truth) for request in requests))
        if not requests:
            return []
        settings = self._settings
        client = JsonClient(
            self._url,
            key_variable=settings.key_variable,
            timeout=settings.timeout_seconds,
            retry_seconds=settings.retry_seconds,
            concurrency=settings.concurrency,
            rate_limit=self._rate_limit,
        )

        async def ask(row: int) -> Score:
            score = await self._ask(client, requests[row])
            self._unanswered = self._unanswered + 1 if score.status == "endpoint_error" else 0
            if self._unanswered > settings.concurrency + _FAILED_IN_A_ROW:
                raise EngineError(
                    f"the judge has not answered {self._unanswered} rows in a row ({score.detail})",
                    where=self._where,
                    remedy="start it; rows that are already stored are kept",
                )
            return score

        return client.map(ask, len(requests), progress)

    def score_row(self, request: RewardRequest) -> Score:
        """Return the score of one row."""
        return self.score([request])[0]

    @property
    def _where(self) -> str:
        return f"{self._section}.url {self._url}"

    async def _ask(self, client: JsonClient, request: RewardRequest) -> Score:
        try:
            body = self._body(request)
        except Exception as error:  # a template that fails on this row, or text that is not Unicode
            return Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))
        try:
            reply = await client.request("POST", "chat/completions", body)
        except Unavailable as error:
            return Score(None, "endpoint_error", clip(str(error)))
        except Refused as error:
            return await self._refused(client, error)
        self._check(reply)
        return guarded(partial(self._read, request, reply))

    async def _refused(self, client: JsonClient, error: Refused) -> Score:
        """Return the status of a refused row. Raises EngineError if a harmless question is refused too."""
        message = clip(str(error))
        if error.status == 413 or error.code == "context_length_exceeded":
            return Score(None, "too_long", message)
        if error.status in (400, 422) and _TOO_LONG.search(error.body):
            return Score(None, "too_long", message)
        if error.code != "content_filter":
            try:
                await client.request("POST", "chat/completions", self._probe())
            except Refused as again:
                self._refuse(again)
            except Unavailable as again:  # the cause of the refusal stays unknown
                return Score(None, "endpoint_error", clip(f"{message}; then {again}"))
        return Score(None, "refused", message)

    def _refuse(self, error: Refused) -> NoReturn:
        remedy = {
            401: f"set the environment variable {self._settings.key_variable} to a key that it takes",
            403: f"the key in {self._settings.key_variable} may not use this model",
            404: f"see {self._section}.url (it usually ends in /v1) and {self._section}.model",
        }.get(error.status, self._wrong_settings)
        raise EngineError(
            f"the judge refuses every request ({error})",
            where=f"{self._where}, model {self._model!r}",
            remedy=remedy,
        ) from None


def first_choice(reply: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first choice of a reply; None for a reply of another form."""
    match reply:
        case {"choices": [{"message": dict()} as choice, *_]}:
            return dict(choice)
    return None
