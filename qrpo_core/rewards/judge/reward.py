"""The reward `judge`: a language model behind an OpenAI-compatible endpoint gives a score on a scale."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.common.hashing import sample_seed
from qrpo_core.config.judge_rewards import JudgeRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score, clip
from qrpo_core.rewards.judge import answer
from qrpo_core.rewards.judge.endpoint import EndpointReward, first_choice
from qrpo_core.rewards.judge.statements import Unreadable

if TYPE_CHECKING:
    import jinja2

#: Variables of a template.
VARIABLES = ("prompt", "completion", "messages", "ground_truth", "lowest", "highest")
#: Finish reasons of services for an answer that met its limit, and for one that was filtered.
_CUT = frozenset({"length", "max_tokens", "model_length"})
_FILTERED = frozenset({"content_filter", "refusal", "safety", "prohibited_content"})
#: Question after a refusal, with the same settings: does the endpoint refuse this row, or everything?
_PROBE = "Reply with the number {lowest} alone."


class JudgeReward(EndpointReward):
    """A language model's score of each row.

    `expected: true` gives the mean of the scale over the token probabilities of the answer, `false` the
    integer that the answer states; `judge.answer` defines both. Other statuses:

    parse_error : the answer states no score; `detail` has the answer.
    refused : the endpoint or the judge refuses this row, but answers others.
    too_long, endpoint_error : see `judge.endpoint`.

    Raises ConfigError for a URL that is not an http address, and for a template that does not parse, names an
    unknown variable or leaves the completion out.
    """

    def __init__(self, config: JudgeRewardConfig) -> None:
        super().__init__(config, "reward.judge", config.model)
        self._config = config
        self._template, used = _compile(config.template)
        self._shows_ground_truth = "ground_truth" in used

    @property
    def needs_ground_truth(self) -> bool:
        """Whether the template shows it."""
        return self._shows_ground_truth

    def _body(self, request: RewardRequest) -> dict[str, Any]:
        config = self._config
        messages = [{"role": role, "content": content} for role, content in request.messages]
        question = self._template.render(
            prompt=messages[-1]["content"],
            completion=request.text,
            messages=messages,
            ground_truth=None if request.ground_truth is None else json.loads(request.ground_truth),
            lowest=config.lowest,
            highest=config.highest,
        )
        question.encode()  # half a surrogate pair cannot be sent
        return self._request(question, sample_seed(0, request.prompt_id, request.sample_index) >> 33)

    def _probe(self) -> dict[str, Any]:
        return self._request(_PROBE.format(lowest=self._config.lowest), 0)

    def _request(self, question: str, seed: int) -> dict[str, Any]:
        """Return the body of a request."""
        config = self._config
        turns = [{"role": "system", "content": config.system}] if config.system is not None else []
        body: dict[str, Any] = {
            **config.extra_body,
            "model": config.model,
            "messages": [*turns, {"role": "user", "content": question}],
        }
        if config.max_completion_tokens is None:
            body["max_tokens"] = config.max_tokens
        else:
            body["max_completion_tokens"] = config.max_completion_tokens
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.expected:
            body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        if config.temperature is None or config.temperature > 0:
            body["seed"] = seed
        return body

    def _check(self, reply: dict[str, Any]) -> None:
        """Raise EngineError without log-probabilities: a fallback would mix two kinds of score."""
        if not self._config.expected:
            return
        choice = first_choice(reply)
        if choice and _text(choice) and not (choice.get("logprobs") or {}).get("content"):
            raise EngineError(
                "the judge gives no log-probabilities, and reward.judge.expected is true",
                where=self._where,
                remedy="set reward.judge.expected: false to take the score that it writes",
            )

    def _read(self, request: RewardRequest, reply: dict[str, Any]) -> float | Score:
        config, choice = self._config, first_choice(reply)
        if choice is None:
            return Score(None, "parse_error", f"a reply of another form: {clip(json.dumps(reply), 200)}")
        text, finish = _text(choice), str(choice.get("finish_reason")).lower()
        if finish in _FILTERED:
            return Score(None, "refused", clip(f"the judge's answer was filtered: {text!r}"))
        if refusal := choice["message"].get("refusal"):
            return Score(None, "refused", clip(f"the judge refuses: {refusal}"))
        if not text:
            longer = "; its thinking filled the limit, raise max_tokens" if finish in _CUT else ""
            return Score(None, "parse_error", f"an empty answer{longer}")
        try:
            cut = finish in _CUT
            score = answer.written(text, config.lowest, config.highest, cut=cut, pattern=config.pattern)
            if not config.expected:
                return float(score.value)
            tokens = choice["logprobs"]["content"]
            return answer.expected(text, tokens, score, config.lowest, config.highest)
        except Unreadable as error:
            return Score(None, "parse_error", clip(str(error)))


def _compile(source: str) -> tuple[jinja2.Template, set[str]]:
    """Return the template, sandboxed and strict about variables, and the variables that it uses."""
    from jinja2 import StrictUndefined, TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        used = meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"reward.judge.template does not parse ({error.message})",
            where=f"line {error.lineno}",
            remedy="it is a jinja template",
        ) from None
    unknown = sorted(used - {*VARIABLES, *environment.globals})
    if unknown:
        raise ConfigError(
            f"reward.judge.template names the unknown variable {unknown[0]!r}",
            remedy=f"use {', '.join(VARIABLES)}",
        )
    if "completion" not in used:
        raise ConfigError(
            "reward.judge.template does not show the completion",
            remedy="write {{ completion }} where it belongs",
        )
    return template, used


def _text(choice: dict[str, Any]) -> str:
    """Return the text of an answer, from one string or its parts, without separate fields of thinking."""
    content = choice["message"].get("content")
    if isinstance(content, list):
        parts = (
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        )
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
