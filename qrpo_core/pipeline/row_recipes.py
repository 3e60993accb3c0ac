"""The recipes of samples, rewards and log-probs: the settings that decide their rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qrpo_core.config import Experiment, RewardConfig, cache_key_fields
from qrpo_core.engines.kinds import kind_of
from qrpo_core.pipeline.policies import Policy, rendering
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.rewards.registry import reward_identity
from qrpo_core.store.recipe import Recipe

SAMPLE_VERSION = 3
REWARD_VERSION = 3
LOGPROB_VERSION = 2

#: Of both sides of a KL estimate; `evaluation.metrics.KL_ARITHMETIC` says it in words.
_KL_PRECISION = "fp32"


def sample_recipe(workspace: Workspace, policy: Policy) -> Recipe:
    """The recipe of samples: the policy, the sampling settings and the variables of its chat template.

    The engine that drew a row is a column, not part of the recipe. If a thinking mark is a special token, the
    text keeps it and the recipe lists it.
    """
    experiment = workspace.experiment
    config = cache_key_fields(experiment.sampling) | {"dtype": experiment.model.dtype}
    config |= rendering(workspace, policy)
    if shown := sorted(policy.special & workspace.thinking_marks):
        config["shown"] = shown
    return Recipe("sample", SAMPLE_VERSION, config, {"policy": drawn_from(experiment, policy.digest)})


def drawn_from(experiment: Experiment, policy_digest: str) -> str:
    """The name of the distribution that samples come from.

    It is the policy's digest, with a prefix for an engine that draws from no policy (fake), and for a
    quantised model, which is another policy. So their rows are never taken for the policy's.
    """
    kind = kind_of(experiment)
    prefix = kind.quantization(experiment) if kind.draws_from_policy else kind.name
    return policy_digest if prefix is None else f"{prefix}:{policy_digest}"


def reward_recipe(workspace: Workspace, texts: Recipe, scorer: RewardConfig | None = None) -> Recipe:
    """The recipe of rewards: the scorer (None: the experiment's) and the texts that it scores."""
    config = reward_identity(workspace.dated(scorer or workspace.experiment.reward))
    return Recipe("reward", REWARD_VERSION, config, {"completions": texts.key})


@dataclass(frozen=True)
class LogprobSettings:
    """How log-probs are computed.

    precision : "bf16" (float32 weights under bfloat16 autocast, where that is native), "bf16-weights" (the
        same with matrices rounded to bfloat16) or "fp32".
    temperature : log-probs are those of softmax(logits / temperature).
    """

    precision: str
    temperature: float

    @classmethod
    def of_training(cls, experiment: Experiment) -> LogprobSettings:
        """The settings of the trainer, so that the log-ratio begins at 0."""
        return cls(experiment.training.arithmetic, experiment.training_temperature)

    @classmethod
    def of_kl(cls, experiment: Experiment) -> LogprobSettings:
        """The settings of a KL estimate: the sampling temperature, and float32, free of bfloat16's rounding.

        Under bfloat16 autocast two policies that are equal in float32 have a KL of about 0.01 nats a token
        (docs/reference/method.md, section 8).
        """
        return cls(_KL_PRECISION, experiment.sampling.temperature)


def logprob_recipe(policy_digest: str, completions: Recipe, settings: LogprobSettings) -> Recipe:
    """The recipe of log-probs: the policy, how they are computed, and the completions."""
    config: dict[str, Any] = {"precision": settings.precision}
    if settings.temperature != 1:  # rows from before this setting, computed at 1, keep their key
        config["temperature"] = settings.temperature
    return Recipe(
        "logprob", LOGPROB_VERSION, config, {"policy": policy_digest, "completions": completions.key}
    )
