"""The section `reward`: its kinds and their fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qrpo_core.common.thinking_marks import UNMISTAKABLE
from qrpo_core.config.judge_rewards import AlpacaEvalRewardConfig, JudgeRewardConfig
from qrpo_core.config.section import (
    IN_CACHE_KEY_IF_SET,
    NOT_IN_CACHE_KEY,
    Day,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    cache_key_fields,
    changed_fields,
)

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
    "alpaca_eval",
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


#: Marks that models are trained to write and that ordinary text does not contain.
KNOWN_MARKS = tuple(ThinkingMarks(open=opening, close=closing) for opening, closing in UNMISTAKABLE)


class ModelRewardConfig(Section):
    """kind model: a sequence classifier that reads the conversation and gives a number."""

    # A recipe holds the model's content digest or commit, not its path.
    path: str = Field(description="A directory or a hub id.", json_schema_extra=NOT_IN_CACHE_KEY)
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub id.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    trust_remote_code: bool = Field(
        False, description="Run the code that the model brings; then revision has to be a commit."
    )
    label: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Which output is the reward, of a model with several."
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of the weights.")
    max_length: PositiveInt | None = Field(
        None,
        description="Longest input in tokens; longer rows have status too_long. null: the model's own limit.",
    )
    date: Day | None = Field(
        None,
        description="Today's date for its chat template, YYYY-MM-DD; null: the date of the prompts.",
        json_schema_extra=IN_CACHE_KEY_IF_SET,
    )
    batch_tokens: PositiveInt = Field(
        16384,
        description="Tokens scored at a time, padding included, and on a CPU at most 512 a thread; halved "
        "when memory runs out.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )


class CodeRewardConfig(Section):
    """kind code: the fraction of its tests that the program in a completion passes, in a sandbox."""

    format: Literal["leetcode", "mbpp", "humaneval"] = Field(description="Form of the ground truths.")
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
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    processes: PositiveInt | None = Field(
        None, description="Programs at a time; null: one a processor.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    unsafe: bool = Field(
        False,
        description="Run programs without a sandbox if bubblewrap is missing: they can read and do "
        "everything that you can.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )


class PythonRewardConfig(Section):
    """kind python: a function of yours, a batch of completions in and a list of scores out."""

    function: str = Field(
        pattern=r"^([\w.]+|[^:]+\.py):\w+$",
        description="module:function, importable where the run is, or FILE.py:function. A file of the "
        "working directory comes before any other module of its name.",
    )
    file: str | None = Field(
        None,
        description="The module's file, where its name does not find it. qrpo submit sets it to the file's "
        "address in the store.",
        json_schema_extra=NOT_IN_CACHE_KEY,  # the key has the file's content
    )
    version: str = Field(
        "1", description="Raise it when the function would score a row differently: it names the scores."
    )
    arguments: dict[str, Any] = Field({}, description="Keyword arguments of every call.")
    batch_size: PositiveInt = Field(
        256, description="Completions a call.", json_schema_extra=NOT_IN_CACHE_KEY
    )


#: By kind: its fields of `RewardConfig`, and those of them that it requires. All kinds but `weighted` also
#: have `thinking`.
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
        ("alpaca_eval", ("alpaca_eval",), ("alpaca_eval",)),
        ("python", ("python",), ("python",)),
    ]
}


class RewardConfig(Section):
    """The reward of a completion: one scorer, or a weighted sum of others."""

    kind: Kind = Field(
        title="Scorer",
        description="The scorer. The description of every other field begins with its kinds.",
    )
    extract: Literal["whole", "last_line", "last_number", "last_integer", "answer_tag"] | None = Field(
        None,
        description="exact, number, reasoning_gym: which part of the completion is the answer; null: the "
        "kind's own rule.",
    )
    tolerance: NonNegativeFloat | None = Field(
        None,
        description="number: largest absolute difference that is equal; null: 1e-6, and at most a thousandth "
        "of the ground truth.",
    )
    min_words: Annotated[int, Field(ge=0)] = Field(0, description="length: fewest words.")
    max_words: PositiveInt | None = Field(None, description="length: most words.")
    terms: tuple[WeightedTerm, ...] = Field((), description="weighted: the scorers and their weights.")
    model: ModelRewardConfig | None = Field(None, description="model: the classifier.")
    code: CodeRewardConfig | None = Field(None, description="code: the form of tests, and limits.")
    judge: JudgeRewardConfig | None = Field(None, description="judge: the endpoint and the question.")
    alpaca_eval: AlpacaEvalRewardConfig | None = Field(
        None, description="alpaca_eval: the endpoint and the annotator."
    )
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
        json_schema_extra=NOT_IN_CACHE_KEY,
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
    """Return every mark of thinking that a reward or one of its terms names."""
    own = {mark for pair in config.thinking or () for mark in (pair.open, pair.close)}
    return frozenset(own).union(*(marks_of(term.reward) for term in config.terms))


def reward_fields(config: RewardConfig) -> dict[str, Any]:
    """Return the fields that decide the scores, ready for JSON: those of the kind without `NOT_IN_CACHE_KEY`.

    Fields of other kinds are left out, so that a new kind does not change the keys of old scores.
    """
    own, _ = _OWN[config.kind]
    kept: dict[str, Any] = {"kind": config.kind}
    for name in sorted(own):
        value = getattr(config, name)
        if isinstance(value, Section):
            kept[name] = cache_key_fields(value)
        elif name == "terms":
            kept[name] = [{"weight": t.weight, "reward": reward_fields(t.reward)} for t in config.terms]
        elif name == "thinking":
            kept[name] = [cache_key_fields(pair) for pair in value] if value is not None else None
        else:
            kept[name] = value
    return kept
