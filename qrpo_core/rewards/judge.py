"""The reward `judge`: a language model behind an OpenAI-compatible endpoint gives a score on a scale."""

from __future__ import annotations

import json
import re
import threading
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import ConfigError, EngineError
from qrpo_core.ids import sample_seed
from qrpo_core.rewards import judge_answer
from qrpo_core.rewards.base import RewardRequest, RowReward, Score, clip, guarded, refuse
from qrpo_core.rewards.config import JudgeRewardConfig
from qrpo_core.rewards.judge_statements import Unreadable

if TYPE_CHECKING:
    import jinja2

    from qrpo_core.http import Client, Refused

#: What a template may name.
VARIABLES = ("prompt", "completion", "messages", "reference", "lowest", "highest")
_URL_REMEDY = "write it as http://host:8000/v1"
#: What a service says of a request that is longer than its model reads.
_TOO_LONG = re.compile(
    r"context (?:length|window|size)|maximum model length|too long|too many (?:input |prompt )?tokens|"
    r"reduce the length|(?:exceed|larger|longer)\w* .{0,40}tokens?\b",
    re.IGNORECASE | re.DOTALL,
)
#: How services write that an answer met its limit, or was taken away.
_CUT = frozenset({"length", "max_tokens", "model_length"})
_FILTERED = frozenset({"content_filter", "refusal", "safety", "prohibited_content"})
#: Asked after a refusal, with the same settings: whether the endpoint refuses this row, or everything.
_PROBE = "Reply with the number {lowest} alone."
#: So many rows in a row without an answer, beyond those asked at a time, end the run: the judge is away.
_FAILED_IN_A_ROW = 32


class JudgeReward(RowReward):
    """The judge's score for each row, or why there is none.

    `expected: true` gives the mean of the scale over the probabilities of the answer's tokens, `false` the
    integer that the answer states; both are defined in `judge_answer`. An answer that is neither is a
    `parse_error` with the answer in `detail`; a request longer than the judge takes is `too_long`; one that
    found no answer within `retry_seconds` is `endpoint_error`; one that the endpoint or the judge refuses,
    while it answers others, is `refused`.

    Raises ConfigError for a URL that is none, and for a template that does not parse, names an unknown
    variable or leaves the completion out.
    """

    def __init__(self, config: JudgeRewardConfig) -> None:
        self._config = config
        if not config.url.startswith(("http://", "https://")):
            raise ConfigError(f"reward.judge.url {config.url!r} is no http address", remedy=_URL_REMEDY)
        if "@" in urllib.parse.urlsplit(config.url).netloc:
            raise ConfigError(
                "reward.judge.url holds a user or a password",
                remedy="give the key in the environment variable that reward.judge.key_variable names",
            )
        self._template, used = _compile(config.template)
        self._shows_reference = "reference" in used
        self._client: Client | None = None
        self._lock = threading.Lock()

    @property
    def needs_reference(self) -> bool:
        """Whether the template shows it: then every row needs one."""
        return self._shows_reference

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests; `concurrency` requests at a time.

        Raises EngineError where the endpoint refuses whatever it is asked (its address, model, key or
        settings are wrong), gives no log-probabilities for `expected: true`, or has not answered many rows
        one after another.
        """
        refuse(self, ((request.prompt_id, request.reference) for request in requests))
        if not requests:
            return []
        client = self._open()
        scores: dict[int, Score] = {}
        failed = 0
        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge")
        rows, asked = iter(range(len(requests))), dict[Future[Score], int]()
        try:
            while len(scores) < len(requests):
                # No more than are asked at a time: after a refusal nothing further goes out.
                for row in islice(rows, self._config.concurrency - len(asked)):
                    asked[pool.submit(self._ask, client, requests[row])] = row
                for done in wait(asked, return_when=FIRST_COMPLETED).done:
                    score = scores[asked.pop(done)] = done.result()
                    progress(1)
                    failed = failed + 1 if score.status == "endpoint_error" else 0
                    if failed > self._config.concurrency + _FAILED_IN_A_ROW:
                        raise EngineError(
                            f"the judge has not answered {failed} rows in a row ({score.detail})",
                            where=self._where,
                            remedy="see that it runs; rows that are already stored are kept",
                        )
        except BaseException:
            self.close()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return [scores[row] for row in range(len(requests))]

    def score_row(self, request: RewardRequest) -> Score:
        """The score of one row."""
        return self._ask(self._open(), request)

    def close(self) -> None:
        """Close the connections; requests that wait for another try give up."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    @property
    def _where(self) -> str:
        from qrpo_core.http import shown

        return f"reward.judge.url {shown(self._config.url)}"

    def _open(self) -> Client:
        from qrpo_core.http import Client

        config = self._config
        with self._lock:
            if self._client is None:
                self._client = Client(
                    config.url,
                    key_variable=config.key_variable,
                    timeout=config.timeout_seconds,
                    retry_seconds=config.retry_seconds,
                    per_minute=config.requests_per_minute,
                    connections=config.concurrency,
                )
            return self._client

    def _ask(self, client: Client, request: RewardRequest) -> Score:
        from qrpo_core.http import Refused, Unavailable

        try:
            body = self._body(request)
        except Exception as error:  # a template that fails on this row, or text that is not Unicode
            return Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))
        try:
            reply = self._post(client, body)
        except Unavailable as error:
            return Score(None, "endpoint_error", clip(str(error)))
        except Refused as error:
            return self._refused(client, error)
        if self._config.expected:
            self._check_logprobs(reply)
        return guarded(partial(self._read, reply))

    def _post(self, client: Client, body: dict[str, Any]) -> dict[str, Any]:
        from qrpo_core.http import Stopped

        try:
            return client.post("chat/completions", body)
        except Stopped:
            raise EngineError("the judge was closed while rows waited", where=self._where) from None

    def _refused(self, client: Client, error: Refused) -> Score:
        """The status of a refused row. Raises EngineError where a harmless question is refused as well."""
        from qrpo_core.http import Refused, Unavailable

        told = clip(f"status {error.status}: {error.message}")
        if error.status == 413 or error.code == "context_length_exceeded":
            return Score(None, "too_long", told)
        if error.status in (400, 422) and _TOO_LONG.search(error.message):
            return Score(None, "too_long", told)
        if error.code != "content_filter":
            try:
                self._post(client, self._asked(_PROBE.format(lowest=self._config.lowest), 0))
            except Refused as again:
                self._refuse(again)
            except Unavailable as again:  # nobody can say whose fault it was
                return Score(None, "endpoint_error", clip(f"{told}; then {again}"))
        return Score(None, "refused", told)

    def _body(self, request: RewardRequest) -> dict[str, Any]:
        config = self._config
        messages = [{"role": role, "content": content} for role, content in request.messages]
        question = self._template.render(
            prompt=messages[-1]["content"],
            completion=request.text,
            messages=messages,
            reference=None if request.reference is None else json.loads(request.reference),
            lowest=config.lowest,
            highest=config.highest,
        )
        question.encode()  # half a surrogate pair cannot be sent
        return self._asked(question, sample_seed(0, request.prompt_id, request.sample_index) >> 33)

    def _asked(self, question: str, seed: int) -> dict[str, Any]:
        """The body of a request."""
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

    def _check_logprobs(self, reply: dict[str, Any]) -> None:
        """Refuse a judge that gives none: falling back would mix two kinds of score in one reward."""
        choice = _choice(reply)
        if choice and _said(choice) and not (choice.get("logprobs") or {}).get("content"):
            raise EngineError(
                "the judge gives no log-probabilities, and reward.judge.expected is true",
                where=self._where,
                remedy="set reward.judge.expected: false to take the score that it writes",
            )

    def _read(self, reply: dict[str, Any]) -> float | Score:
        config, choice = self._config, _choice(reply)
        if choice is None:
            return Score(None, "parse_error", f"a reply of another form: {clip(json.dumps(reply), 200)}")
        text, finish = _said(choice), str(choice.get("finish_reason")).lower()
        if finish in _FILTERED:
            return Score(None, "refused", clip(f"the judge's answer was filtered: {text!r}"))
        if refusal := choice["message"].get("refusal"):
            return Score(None, "refused", clip(f"the judge refuses: {refusal}"))
        if not text:
            longer = "; its thinking filled the limit, raise max_tokens" if finish in _CUT else ""
            return Score(None, "parse_error", f"an empty answer{longer}")
        try:
            cut = finish in _CUT
            score = judge_answer.written(text, config.lowest, config.highest, cut=cut, pattern=config.pattern)
            if not config.expected:
                return float(score.value)
            tokens = choice["logprobs"]["content"]
            return judge_answer.expected(text, tokens, score, config.lowest, config.highest)
        except Unreadable as error:
            return Score(None, "parse_error", clip(str(error)))

    def _refuse(self, error: Refused) -> NoReturn:
        remedy = {
            401: f"set the environment variable {self._config.key_variable} to a key that it takes",
            403: f"the key in {self._config.key_variable} may not use this model",
            404: "see reward.judge.url (it usually ends in /v1) and reward.judge.model",
        }.get(error.status, "see reward.judge: url, model, max_completion_tokens, temperature, top_logprobs")
        raise EngineError(
            f"the judge refuses with status {error.status} ({error.message})",
            where=f"{self._where}, model {self._config.model!r}",
            remedy=remedy,
        ) from None


def _compile(source: str) -> tuple[jinja2.Template, set[str]]:
    """The template, in a sandbox and strict about what it names, and the variables that it uses."""
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
            f"reward.judge.template names {unknown[0]!r}, which is not known",
            remedy=f"known are {', '.join(VARIABLES)}",
        )
    if "completion" not in used:
        raise ConfigError(
            "reward.judge.template does not show the completion",
            remedy="write {{ completion }} where it belongs",
        )
    return template, used


def _choice(reply: dict[str, Any]) -> dict[str, Any] | None:
    match reply:
        case {"choices": [{"message": dict()} as choice, *_]}:
            return dict(choice)
    return None


def _said(choice: dict[str, Any]) -> str:
    """The text of an answer, in parts or in one; what the judge thought in a field of its own is no part."""
    content = choice["message"].get("content")
    if isinstance(content, list):
        parts = (
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        )
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
