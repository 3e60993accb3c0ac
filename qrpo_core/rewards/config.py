"""What a completion is worth: the section of each kind of reward."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qrpo_core.section import (
    Day,
    Later,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Speed,
    changed_fields,
    recipe_fields,
)
from qrpo_core.thinking_marks import UNMISTAKABLE

Kind = Literal[
    "number",
    "exact",
    "reasoning_gym",
    "math",
    "sentiment",
    "length",
    "weighted",
    "model",
    "code",
    "judge",
    "python",
]


class ThinkingMarks(Section):
    """The marks around a model's thinking."""

    open: str = Field(min_length=1, description="Opens the thinking, such as <think>.")
    close: str = Field(min_length=1, description="Closes it, such as </think>.")

    @model_validator(mode="after")
    def _differ(self) -> ThinkingMarks:
        if self.open in self.close or self.close in self.open:
            raise ValueError(f"the marks {self.open!r} and {self.close!r} cannot be told apart")
        return self


#: The marks that models are trained to write; none of them stands in ordinary text.
KNOWN_MARKS = tuple(ThinkingMarks(open=opening, close=closing) for opening, closing in UNMISTAKABLE)


class ModelRewardConfig(Section):
    """kind model: a sequence classifier that reads the conversation and gives a number."""

    # A recipe has the content or commit of what they name (model_source.model_identity), never the place.
    path: str = Field(description="A directory or a hub id.", json_schema_extra=Speed)
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub id.", json_schema_extra=Speed
    )
    trust_remote_code: bool = Field(
        False, description="Run the code that the model brings; then revision has to be a commit."
    )
    label: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Which output is the reward, of a model with several."
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of the weights.")
    max_length: PositiveInt | None = Field(
        None, description="Longest input in tokens, longer ones have status too_long; null: the model's own."
    )
    date: Day | None = Field(
        None,
        description="The day that its chat template takes for today, YYYY-MM-DD; null: that of the prompts.",
        json_schema_extra=Later,
    )
    batch_tokens: PositiveInt = Field(
        16384,
        description="Tokens scored at a time, padding included, and on a CPU at most 512 a thread; halved "
        "when memory runs out.",
        json_schema_extra=Speed,
    )


class CodeRewardConfig(Section):
    """kind code: the share of its tests that the program in a completion passes, in a sandbox."""

    format: Literal["leetcode", "mbpp", "humaneval"] = Field(description="Form of the references.")
    seconds_per_test: PositiveFloat = Field(
        6.0, description="Time that one test may take, and loading the program."
    )
    seconds_per_program: PositiveFloat = Field(
        60.0, description="Time that all tests of a program may take; then the row has status timeout."
    )
    memory_mb: Annotated[int, Field(ge=64)] = Field(
        1024, description="Memory (address space) of each process of a program."
    )
    packages: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], ...] = Field(
        (),
        description="Installed packages that programs and tests may import beside the standard library, by "
        "the names of their imports, such as sortedcontainers or numpy; their versions name the scores.",
    )
    python: str | None = Field(
        None,
        description="Virtual environment, or interpreter, that runs programs and has the packages; null: "
        "this one. Its version names the scores, not its place.",
        json_schema_extra=Speed,
    )
    processes: PositiveInt | None = Field(
        None,
        description="Programs at a time; null: one a processor.",
        json_schema_extra=Speed,
    )
    unsafe: bool = Field(
        False,
        description="Run programs without a sandbox where bubblewrap is missing: they can read and do "
        "whatever you can.",
        json_schema_extra=Speed,
    )


class JudgeRewardConfig(Section):
    """kind judge: a language model behind an OpenAI-compatible endpoint that gives a score on a scale."""

    url: str = Field(description="Base URL, such as http://host:8000/v1.", json_schema_extra=Speed)
    model: str = Field(description="Name of the judge.")
    template: str = Field(
        description="What the judge is asked, as a jinja template; it knows prompt (the last turn), "
        "completion, messages, reference, lowest and highest."
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
        description="Take the expected score over the tokens' probabilities; an endpoint that gives none is "
        "refused. false: the score that it wrote.",
    )
    pattern: str | None = Field(
        None,
        description="Regular expression of the score in its answer; its last match counts, the group `score` "
        "or the first one if it has groups. null: the rule of docs/rewards.md.",
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
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key.", json_schema_extra=Speed
    )
    concurrency: PositiveInt = Field(16, description="Requests at a time.", json_schema_extra=Speed)
    requests_per_minute: PositiveInt | None = Field(
        None, description="Rate limit; null: none.", json_schema_extra=Speed
    )
    timeout_seconds: PositiveFloat = Field(
        120.0, description="Longest time of one request.", json_schema_extra=Speed
    )
    retry_seconds: NonNegativeFloat = Field(
        120.0,
        description="Longest time that a request goes on trying against errors that pass.",
        json_schema_extra=Speed,
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


#: What the reward itself puts into a request of a judge.
_SENT = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature"}
    | {"logprobs", "top_logprobs", "seed", "n", "stream"}
)


class PythonRewardConfig(Section):
    """kind python: a function of yours, a batch of completions in and a list of scores out."""

    function: str = Field(
        pattern=r"^([\w.]+|[^:]+\.py):\w+$",
        description="module:function, importable where the run is, or FILE.py:function. A file of the "
        "working directory comes before any other module of its name.",
    )
    version: str = Field(
        "1", description="Raise it when the function would score a row differently: it names the scores."
    )
    arguments: dict[str, Any] = Field({}, description="Keyword arguments of every call.")
    batch_size: PositiveInt = Field(256, description="Completions a call.", json_schema_extra=Speed)


#: The fields of `RewardConfig` that belong to each kind, beside `thinking`, which all but `weighted` have;
#: those in the second place are needed.
_OWN: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    kind: (frozenset(own) | (frozenset() if kind == "weighted" else {"thinking"}), frozenset(needed))
    for kind, own, needed in [
        ("number", ("extract", "tolerance"), ()),
        ("exact", ("extract",), ()),
        ("reasoning_gym", ("extract",), ()),
        ("math", (), ()),
        ("sentiment", (), ()),
        ("length", ("min_words", "max_words"), ("max_words",)),
        ("weighted", ("terms",), ("terms",)),
        ("model", ("model",), ("model",)),
        ("code", ("code",), ("code",)),
        ("judge", ("judge",), ("judge",)),
        ("python", ("python",), ("python",)),
    ]
}


class RewardConfig(Section):
    """What a completion is worth: one scorer, or a weighted sum of others."""

    kind: Kind = Field(
        title="Scorer",
        description="What gives the reward. The other fields begin with the kinds that they belong to.",
    )
    extract: Literal["whole", "last_line", "last_number", "last_integer", "answer_tag"] | None = Field(
        None,
        description="exact, number, reasoning_gym: which part of the completion is the answer; null: the "
        "kind's own rule.",
    )
    tolerance: NonNegativeFloat | None = Field(
        None,
        description="number: largest absolute difference that is equal; null: 1e-6, and at most a thousandth "
        "of the reference.",
    )
    min_words: Annotated[int, Field(ge=0)] = Field(0, description="length: fewest words.")
    max_words: PositiveInt | None = Field(None, description="length: most words.")
    terms: tuple[WeightedTerm, ...] = Field((), description="weighted: the scorers and their weights.")
    model: ModelRewardConfig | None = Field(None, description="model: the classifier.")
    code: CodeRewardConfig | None = Field(None, description="code: the form of tests, and limits.")
    judge: JudgeRewardConfig | None = Field(None, description="judge: the endpoint and the question.")
    python: PythonRewardConfig | None = Field(None, description="python: the function.")
    thinking: tuple[ThinkingMarks, ...] | None = Field(
        KNOWN_MARKS,
        description="Marks around the thinking, a pair or a list of pairs: only what follows is graded. "
        "null: the reward sees the whole completion.",
    )

    trust: Literal["refuse", "warn"] = Field(
        "refuse",
        description="number, exact, math, reasoning_gym, code: whether a run stops, before anything is "
        "sampled, where a constant answer gets the full score or the right answer does not.",
        json_schema_extra=Speed,
    )

    @field_validator("thinking", mode="before")
    @classmethod
    def _one_pair(cls, value: Any) -> Any:
        return (value,) if isinstance(value, dict | ThinkingMarks) else value

    @model_validator(mode="after")
    def _needs(self) -> RewardConfig:
        own, needed = _OWN[self.kind]
        if self.thinking == ():
            raise ValueError("reward.thinking names no marks; write null for a reward that sees the thinking")
        changed = changed_fields(self) - {"kind"}
        for field in sorted(changed & {"thinking", "trust"} if self.kind == "weighted" else ()):
            raise ValueError(f"reward.{field} belongs to the terms of a weighted reward; set it in each term")
        for field in sorted(changed - own - {"trust"}):
            raise ValueError(f"reward.{field} does not belong to kind {self.kind!r}; remove it")
        for field in sorted(needed):
            if not getattr(self, field):
                raise ValueError(f"reward.{field} is missing; kind {self.kind!r} needs it")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"reward.max_words {self.max_words} is below reward.min_words {self.min_words}")
        return self


class WeightedTerm(Section):
    """One scorer of a weighted sum."""

    weight: Annotated[float, Field(allow_inf_nan=False, description="Factor of this scorer's reward.")]
    reward: RewardConfig


def has_kind(config: RewardConfig, kind: Kind) -> bool:
    """Whether a reward, or a term of it, is of a kind."""
    return config.kind == kind or any(has_kind(term.reward, kind) for term in config.terms)


def marks_of(config: RewardConfig) -> frozenset[str]:
    """Every mark of thinking that a reward, or a term of it, names."""
    own = {mark for pair in config.thinking or () for mark in (pair.open, pair.close)}
    return frozenset(own).union(*(marks_of(term.reward) for term in config.terms))


def reward_fields(config: RewardConfig) -> dict[str, Any]:
    """The fields that decide the scores: those of the kind, without what is marked `Speed`; JSON-ready.

    A field of another kind is no part of it, so that a new kind leaves the names of old scores alone.
    """
    own, _ = _OWN[config.kind]
    kept: dict[str, Any] = {"kind": config.kind}
    for name in sorted(own):
        value = getattr(config, name)
        if isinstance(value, Section):
            kept[name] = recipe_fields(value)
        elif name == "terms":
            kept[name] = [{"weight": t.weight, "reward": reward_fields(t.reward)} for t in config.terms]
        elif name == "thinking":
            kept[name] = [recipe_fields(pair) for pair in value] if value is not None else None
        else:
            kept[name] = value
    return kept
