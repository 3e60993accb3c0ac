"""The reward of a config, and the checks of rewards before a run.

To add a kind of reward: write its class; name it here in `_bare_reward` and `SCORER_VERSIONS`, and in
`LIBRARIES` and `_identities` if a library or a file decides its scores; add it to `Kind` and its fields to
`_OWN` in `config/rewards.py`; give it an example in docs/how-to/ and a line in the glossary (tests ask).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.rewards import RewardConfig, reward_fields
from qrpo_core.rewards.base import GroundTruthProblem, Reward
from qrpo_core.rewards.thinking import AnswerOnly
from qrpo_core.rewards.trust import Doubt, doubts, terms

T = TypeVar("T")

#: The version of each scorer. Raise it by hand when the scorer would score any row differently. A change of
#: shared code (reading of numbers, extraction, limits) is a change of every scorer that uses it.
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
    "alpaca_eval": 1,
    "python": 1,
}

#: The installed packages that the scores of a kind depend on.
LIBRARIES = {
    "reasoning_gym": ("reasoning-gym", "sympy"),
    "math": ("math-verify", "latex2sympy2_extended", "sympy"),
    "sentiment": ("vaderSentiment",),
}


def make_reward(config: RewardConfig) -> Reward:
    """Return the reward of a config. It grades what follows the thinking, unless `thinking` is null.

    The library of a kind is imported at the first row, not here. Raises ConfigError if it is not installed.
    """
    for name in LIBRARIES.get(config.kind, ()):
        _version(name, config.kind)
    reward = _bare_reward(config)
    if config.kind == "weighted" or config.thinking is None:  # each term of a sum has marks of its own
        return reward
    return AnswerOnly(reward, config.thinking)


def _bare_reward(config: RewardConfig) -> Reward:
    """Return the reward of a kind, which grades the whole completion.

    The imports stand here so that a run loads only the kinds that it uses.
    """
    match config.kind:
        case "number":
            from qrpo_core.rewards.verifiable.rewards import NumberReward

            return NumberReward(config.extract, config.tolerance)
        case "exact":
            from qrpo_core.rewards.verifiable.rewards import ExactReward

            return ExactReward(config.extract)
        case "reasoning_gym":
            from qrpo_core.rewards.verifiable.rewards import ReasoningGymReward

            return ReasoningGymReward(config.extract)
        case "math":
            from qrpo_core.rewards.verifiable.rewards import MathReward

            return MathReward()
        case "sentiment":
            from qrpo_core.rewards.sentiment import SentimentReward

            return SentimentReward()
        case "length":
            from qrpo_core.rewards.length import LengthReward

            return LengthReward(config.min_words, _given(config.max_words))
        case "weighted":
            from qrpo_core.rewards.weighted import WeightedReward

            return WeightedReward(
                [
                    (f"terms.{place} ({term.reward.kind})", term.weight, make_reward(term.reward))
                    for place, term in enumerate(config.terms)
                ]
            )
        case "code":
            from qrpo_core.rewards.code.reward import CodeReward

            return CodeReward(_given(config.code))
        case "model":
            from qrpo_core.rewards.model.reward import ModelReward

            return ModelReward(_given(config.model))
        case "judge":
            from qrpo_core.rewards.judge.reward import JudgeReward

            return JudgeReward(_given(config.judge))
        case "alpaca_eval":
            from qrpo_core.rewards.alpaca_eval.reward import AlpacaEvalReward

            return AlpacaEvalReward(_given(config.alpaca_eval))
        case "python":
            from qrpo_core.rewards.python.reward import PythonReward

            return PythonReward(_given(config.python))


def _given(value: T | None) -> T:
    """Return a field that the config's own check has required."""
    assert value is not None
    return value


def check_ground_truths(
    config: RewardConfig, ground_truths: Iterable[tuple[str, str | None]]
) -> list[GroundTruthProblem]:
    """Return every ground truth that the reward cannot use, at most one problem a row, in order of the rows.

    ground_truths : (prompt_id, ground truth) pairs, one a prompt; a ground truth is JSON or None.

    `math` and `reasoning_gym` start their scoring process for it (1 to 3 s); the other kinds cost nothing.
    Raises ConfigError or ModelError where the reward itself cannot be used.
    """
    with contextlib.closing(make_reward(config)) as reward:
        return reward.problems(ground_truths)


def reward_doubts(
    config: RewardConfig, ground_truths: Iterable[tuple[str, str | None]], at: str = "reward"
) -> list[tuple[str, RewardConfig, Doubt]]:
    """Return reasons not to trust a reward or the terms of a sum, as (place, config there, doubt).

    ground_truths : (prompt_id, ground truth) pairs that `check_ground_truths` accepts.
    at : place of the reward in the experiment.

    See `rewards.trust`, which tries the reward on a few prompts; it takes a few seconds at most.
    """
    pairs = list(ground_truths)
    found = []
    for place, section in terms(config, at):
        with contextlib.closing(make_reward(section)) as reward:
            found += [(place, section, doubt) for doubt in doubts(section, reward, pairs)]
    return found


def sees(reward: RewardConfig, judge: RewardConfig) -> bool:
    """Whether a training on `reward` sees the judge: it is the reward, or one of its terms."""
    seen = [reward, *(term for _, term in terms(reward))]
    return reward_identity(judge) in map(reward_identity, seen)


def reward_identity(config: RewardConfig) -> dict[str, Any]:
    """Return the part of a recipe that decides the scores, ready for JSON. No scorer is imported.

    config : the fields of its kind.
    scorers : version of each kind in use.
    libraries : installed version of each package that these kinds depend on.
    identities : only where something outside the config decides scores. By place ("reward", or "terms.0" of a
        weighted one): the content of a model or of a function's file, or the versions of the packages that
        graded programs may import.

    Raises ConfigError or ModelError if a library is not installed, or a model or function does not exist.
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
    """Yield the place and the identity of everything outside the config that decides scores."""
    if config.model is not None:
        from qrpo_core.rewards.model.source import model_identity

        yield place or "reward", model_identity(config.model)
    if config.code is not None and (config.code.packages or config.code.python):
        from qrpo_core.rewards.code.environment import environment_identity

        yield place or "reward", environment_identity(config.code)
    if config.alpaca_eval is not None:
        from qrpo_core.rewards.alpaca_eval.package import version

        yield place or "reward", {"alpaca-eval": version(config.alpaca_eval.python)}
    if config.python is not None:
        from qrpo_core.rewards.python.reward import function_identity

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
            f"reward kind {kind!r} needs the package {distribution}",
            where="reward.kind",
            remedy="pip install 'qrpo[rewards]'",
        ) from None
