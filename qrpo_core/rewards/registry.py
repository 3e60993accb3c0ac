"""From a reward's section of the experiment to the reward, its description and its needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qrpo_core.errors import ConfigError
from qrpo_core.rewards.base import CheckedReward, ReferenceProblem, Reward, refuse
from qrpo_core.rewards.config import RewardConfig, reward_fields
from qrpo_core.rewards.thinking import AnswerOnly
from qrpo_core.rewards.trust import Doubt, doubts, terms

#: The version of each scorer of ours, raised by hand when it would score any row differently. What all of
#: them share (reading of numbers, extraction, limits) counts as a change of every scorer that uses it.
SCORER_VERSIONS = {
    "number": 2,
    "exact": 2,
    "reasoning_gym": 2,
    "math": 2,
    "sentiment": 1,
    "length": 1,
    "weighted": 1,
    "model": 2,
    "code": 2,
    "judge": 2,
    "python": 1,
}

#: The distributions whose behaviour a kind's scores depend on.
LIBRARIES = {
    "reasoning_gym": ("reasoning-gym", "sympy"),
    "math": ("math-verify", "latex2sympy2_extended", "sympy"),
    "sentiment": ("vaderSentiment",),
}


def make_reward(config: RewardConfig) -> Reward:
    """The reward of a configuration: it grades what follows the thinking, unless `thinking` is null.

    Its library is imported at the first row, not here.

    Raises ConfigError if that library is not installed.
    """
    return _build(config)


def needs_reference(config: RewardConfig) -> bool:
    """Whether prompts need a reference to be scored with this reward."""
    return _build(config).needs_reference


def check_references(
    config: RewardConfig, references: Iterable[tuple[str, str | None]]
) -> list[ReferenceProblem]:
    """Every reference that the reward cannot score against, before anything is sampled or scored.

    references : (prompt_id, reference) pairs, one a prompt; a reference is JSON or None.
    Returns at most one problem a row, in the order of the rows. Raises ConfigError or ModelError where the
    reward itself cannot be used. Cheap, except that `math` and `reasoning_gym` start their scoring process
    (1 to 3 s) and read references with it.
    """
    reward = _build(config)
    try:
        return reward.problems(references)
    finally:
        reward.close()


def refuse_references(config: RewardConfig, references: Iterable[tuple[str, str | None]]) -> None:
    """Raise a DataError for the first reference that `check_references` finds, with the number of others."""
    reward = _build(config)
    try:
        refuse(reward, references)
    finally:
        reward.close()


def reward_doubts(
    config: RewardConfig, references: Iterable[tuple[str, str | None]], at: str = "reward"
) -> list[tuple[str, RewardConfig, Doubt]]:
    """Why not to trust a reward, or the terms of a sum: see `rewards.trust`, which tries it on a few prompts.

    references : (prompt_id, reference) pairs that `check_references` has nothing against. at : the place of
    the reward in the experiment.
    Returns the place in the experiment, the section there and the doubt. No kind that is looked at costs more
    than a few seconds.
    """
    pairs = list(references)
    found = []
    for place, section in terms(config, at):
        reward = _build(section)
        try:
            found += [(place, section, doubt) for doubt in doubts(section, reward, pairs)]
        finally:
            reward.close()
    return found


def reward_identity(config: RewardConfig) -> dict[str, Any]:
    """What decides the scores, for a recipe: JSON-ready, and imports no scorer.

    Keys: `config` (the fields of its kind), `scorers` (the version of each kind used, ours),
    `libraries` (the installed version of each distribution that the kinds used depend on) and, only where
    something outside the config decides scores, `identities`: by place ("reward", or "terms.0" of a weighted
    one), the content of a model or of a function's file, or the versions of the packages that graded programs
    may import.
    Raises ConfigError if a library is not installed; ModelError or ConfigError where there is no such model
    or function.
    """
    kinds = sorted(_kinds(config))
    names = sorted({name for kind in kinds for name in LIBRARIES.get(kind, ())})
    identity: dict[str, Any] = {
        "config": reward_fields(config),
        "scorers": {kind: SCORER_VERSIONS[kind] for kind in kinds},
        "libraries": {name: _version(name, config.kind) for name in names},
    }
    if outside := dict(_identities(config, "")):
        identity["identities"] = outside
    return identity


def _identities(config: RewardConfig, place: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What is named by content, by its place in the reward."""
    if config.model is not None:
        from qrpo_core.rewards.model_source import model_identity

        yield place or "reward", model_identity(config.model)
    if config.code is not None and (config.code.packages or config.code.python):
        from qrpo_core.rewards.code_environment import environment_identity

        yield place or "reward", environment_identity(config.code)
    if config.python is not None:
        from qrpo_core.rewards.python import function_identity

        yield place or "reward", function_identity(config.python)
    for number, term in enumerate(config.terms):
        yield from _identities(term.reward, f"{place}.terms.{number}".lstrip("."))


def _kinds(config: RewardConfig) -> set[str]:
    return {config.kind}.union(*(_kinds(term.reward) for term in config.terms))


def _version(distribution: str, kind: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"reward kind {kind!r} needs the package {distribution}, which is not installed",
            where="reward.kind",
            remedy=f"install {distribution}, or choose another reward",
        ) from None


def _build(config: RewardConfig) -> CheckedReward:
    for name in LIBRARIES.get(config.kind, ()):
        _version(name, config.kind)
    reward = _BUILDERS[config.kind](config)
    if config.kind == "weighted" or config.thinking is None:  # each term of a sum has marks of its own
        return reward
    return AnswerOnly(reward, config.thinking)


def _number(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.verifiable import NumberReward

    return NumberReward(config.extract, config.tolerance)


def _exact(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.verifiable import ExactReward

    return ExactReward(config.extract)


def _reasoning_gym(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.verifiable import ReasoningGymReward

    return ReasoningGymReward(config.extract)


def _math(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.verifiable import MathReward

    return MathReward()


def _sentiment(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.dense import SentimentReward

    return SentimentReward()


def _length(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.dense import LengthReward

    assert config.max_words is not None  # the section refuses this; said again for the type checker
    return LengthReward(config.min_words, config.max_words)


def _weighted(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.dense import WeightedReward

    return WeightedReward(
        [
            (f"terms.{place} ({term.reward.kind})", term.weight, _build(term.reward))
            for place, term in enumerate(config.terms)
        ]
    )


def _code(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.code import CodeReward

    assert config.code is not None  # the section refuses this; said again for the type checker
    return CodeReward(config.code)


def _model(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.model import ModelReward

    assert config.model is not None
    return ModelReward(config.model)


def _judge(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.judge import JudgeReward

    assert config.judge is not None
    return JudgeReward(config.judge)


def _python(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.python import PythonReward

    assert config.python is not None
    return PythonReward(config.python)


_BUILDERS: dict[str, Callable[[RewardConfig], CheckedReward]] = {
    "number": _number,
    "exact": _exact,
    "reasoning_gym": _reasoning_gym,
    "math": _math,
    "sentiment": _sentiment,
    "length": _length,
    "weighted": _weighted,
    "model": _model,
    "code": _code,
    "judge": _judge,
    "python": _python,
}
