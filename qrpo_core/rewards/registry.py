"""From a reward's section of the experiment to the reward, its description and its needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from typing import Any

from qrpo_core.config import RewardConfig, recipe_fields
from qrpo_core.errors import ConfigError
from qrpo_core.rewards.base import CheckedReward, Reward

#: The version of each scorer of ours, raised by hand when it would score any row differently. What all of
#: them share (reading of numbers, extraction, limits) counts as a change of every scorer that uses it.
SCORER_VERSIONS = {
    "number": 1,
    "exact": 1,
    "reasoning_gym": 1,
    "math": 1,
    "sentiment": 1,
    "length": 1,
    "weighted": 1,
}

#: The distributions whose behaviour a kind's scores depend on.
LIBRARIES = {
    "reasoning_gym": ("reasoning-gym", "sympy"),
    "math": ("math-verify", "latex2sympy2_extended", "sympy"),
    "sentiment": ("vaderSentiment",),
}


def make_reward(config: RewardConfig) -> Reward:
    """The reward of a configuration. Its library is imported at the first row, not here.

    Raises ConfigError if that library is not installed.
    """
    return _build(config)


def needs_reference(config: RewardConfig) -> bool:
    """Whether prompts need a reference to be scored with this reward."""
    return _build(config).needs_reference


def check_references(config: RewardConfig, references: Iterable[tuple[str, str | None]]) -> None:
    """Refuse references that the reward cannot score against, before anything is sampled or scored.

    references : (prompt_id, reference) pairs, one a prompt; a reference is JSON or None.
    Raises DataError naming the first such prompt. Cheap, except that `math` and `reasoning_gym` start
    their scoring process (1 to 3 s) and read each reference with it.
    """
    _build(config).check(references)


def reward_identity(config: RewardConfig) -> dict[str, Any]:
    """What decides the scores, for a recipe: JSON-ready, and imports no scorer.

    Keys: `config` (every field of the section), `scorers` (the version of each kind used, ours) and
    `libraries` (the installed version of each distribution that the kinds used depend on).
    Raises ConfigError if one of these is not installed.
    """
    kinds = sorted(_kinds(config))
    names = sorted({name for kind in kinds for name in LIBRARIES.get(kind, ())})
    return {
        "config": recipe_fields(config),
        "scorers": {kind: SCORER_VERSIONS[kind] for kind in kinds},
        "libraries": {name: _version(name, config.kind) for name in names},
    }


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
    return _BUILDERS[config.kind](config)


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

    if config.max_words is None:  # the section refuses this; said again for the type checker
        raise ConfigError("reward.max_words is missing; kind 'length' needs it")
    return LengthReward(config.min_words, config.max_words)


def _weighted(config: RewardConfig) -> CheckedReward:
    from qrpo_core.rewards.dense import WeightedReward

    return WeightedReward(
        [
            (f"terms.{place} ({term.reward.kind})", term.weight, _build(term.reward))
            for place, term in enumerate(config.terms)
        ]
    )


_BUILDERS: dict[str, Callable[[RewardConfig], CheckedReward]] = {
    "number": _number,
    "exact": _exact,
    "reasoning_gym": _reasoning_gym,
    "math": _math,
    "sentiment": _sentiment,
    "length": _length,
    "weighted": _weighted,
}
