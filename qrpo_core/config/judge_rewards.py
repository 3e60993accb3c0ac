"""The rewards that a language model behind an endpoint gives: kinds `judge` and `alpaca_eval`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from qrpo_core.config.section import (
    NOT_IN_CACHE_KEY,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    changed_fields,
)

#: Fields of a judge's request that the reward sets.
_SENT = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature"}
    | {"logprobs", "top_logprobs", "seed", "n", "stream"}
)


class EndpointSettings(Section):
    """Where a judge answers, and how it is asked."""

    url: str = Field(description="Base URL, such as http://host:8000/v1.", json_schema_extra=NOT_IN_CACHE_KEY)
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    concurrency: PositiveInt = Field(
        16, description="Requests at a time.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    requests_per_minute: PositiveInt | None = Field(
        None, description="Rate limit; null: none.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    timeout_seconds: PositiveFloat = Field(
        120.0, description="Longest time of one request.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    retry_seconds: NonNegativeFloat = Field(
        120.0,
        description="Longest time that a request is retried on temporary errors.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )


class JudgeRewardConfig(EndpointSettings):
    """kind judge: a language model behind an OpenAI-compatible endpoint that gives a score on a scale."""

    model: str = Field(description="Name of the judge.")
    template: str = Field(
        description="The question, as a jinja template with the variables prompt (the last turn), "
        "completion, messages, ground_truth, lowest and highest."
    )
    system: str | None = Field(None, description="System turn of the request.")
    lowest: int = Field(1, description="Lowest score of the scale.")
    highest: int = Field(
        9,
        description="Highest score of the scale. Scales of one digit are read best: many judges write 10 as "
        "two tokens.",
    )
    expected: bool = Field(
        True,
        description="Take the expected score over the token probabilities; an endpoint without them is "
        "refused. false: take the written score.",
    )
    pattern: str | None = Field(
        None,
        description="Regular expression of the score in its answer; its last match counts, the group `score` "
        "or the first one if it has groups. null: the rule of docs/how-to/rewards.md.",
    )
    max_tokens: PositiveInt = Field(16, description="Length of its answer.")
    max_completion_tokens: PositiveInt | None = Field(
        None,
        description="Length of its answer with its thinking, sent in place of max_tokens to models that take "
        "this name.",
    )
    temperature: NonNegativeFloat | None = Field(
        0.0, description="Temperature of its answer; null: not sent, for models that take none."
    )
    top_logprobs: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="expected: alternatives asked for at each token; services allow from 5 to 20."
    )
    extra_body: dict[str, Any] = Field(
        {},
        description="Further fields of each request, such as reasoning_effort or chat_template_kwargs.",
    )

    @model_validator(mode="after")
    def _has_a_scale(self) -> JudgeRewardConfig:
        if self.highest <= self.lowest:
            raise ValueError(
                f"reward.judge.highest {self.highest} is not above reward.judge.lowest {self.lowest}"
            )
        if self.max_completion_tokens is not None and "max_tokens" in changed_fields(self):
            raise ValueError(
                "reward.judge.max_tokens and max_completion_tokens are one limit under two names; remove one"
            )
        ours = sorted(self.extra_body.keys() & _SENT)
        if ours:
            raise ValueError(
                f"reward.judge.extra_body.{ours[0]} is sent already, by the fields of reward.judge; remove it"
            )
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(
                    f"reward.judge.pattern {self.pattern!r} is no regular expression ({error})"
                ) from None
        if self.expected and self.lowest < 0:
            raise ValueError(
                f"reward.judge.lowest {self.lowest} is negative, and a sign is a token of its own; "
                "set reward.judge.expected: false, or use a scale from 0 or 1"
            )
        return self


class AlpacaEvalRewardConfig(EndpointSettings):
    """kind alpaca_eval: the probability that AlpacaEval's judge prefers the completion to the baseline's."""

    annotator: str = Field(
        "weighted_alpaca_eval_gpt4_turbo",
        pattern=r"^[\w.-]+$",
        description="Annotator of the package alpaca-eval: its question, and how its answer is read.",
    )
    model: str | None = Field(None, description="Name of the judge; null: the annotator's own.")
    python: str | None = Field(
        None,
        description="Virtual environment, or interpreter, that has the package alpaca-eval; null: this one. "
        "The package's version names the scores, not its place.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
