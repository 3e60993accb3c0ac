"""One experiment as frozen models, closed to unknown keys. Reading one from a file: experiments.py.

A field lives in the section of the step whose result it changes. A field marked `Speed` changes how
fast a result comes, not the result: it stays out of every recipe (see `recipe_fields`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qrpo_core.data.config import PromptsConfig
from qrpo_core.engines.config import EndpointConfig, FakeConfig, ParityConfig, SamplingConfig, VllmConfig
from qrpo_core.rewards.config import RewardConfig, WeightedTerm
from qrpo_core.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Speed,
    TemplateVariables,
    recipe_fields,
)
from qrpo_core.train.config import ObjectiveConfig, RoundsConfig, TrainingConfig, TrainingDataConfig

__all__ = [
    "EndpointConfig",
    "EvaluationConfig",
    "Experiment",
    "FakeConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParityConfig",
    "PromptsConfig",
    "RewardConfig",
    "RoundsConfig",
    "SamplingConfig",
    "Section",
    "ServiceConfig",
    "StoreConfig",
    "TopUpConfig",
    "TrainingConfig",
    "TrainingDataConfig",
    "VllmConfig",
    "WeightedTerm",
    "recipe_fields",
]


#: Kinds of reward that give a wrong answer 0, and nothing less.
_WRONG_IS_ZERO = ("number", "exact", "math", "code", "reasoning_gym")


class ModelConfig(Section):
    """The reference policy: the model that training starts from."""

    path: str = Field(
        description="A directory, a hub id, a .gguf file, or package:NAME/FILE.gguf for a file inside an "
        "installed Python package.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Precision of the weights that are sampled from, and in which a .gguf file is stored.",
    )
    chat_template_kwargs: TemplateVariables = Field(
        {},
        description="What the chat template is given beside the messages, such as enable_thinking: false.",
    )


class EvaluationConfig(Section):
    """Held-out comparison of the trained policy with the reference."""

    samples_per_prompt: PositiveInt = Field(
        4, description="Completions of every held-out prompt, each policy."
    )
    confidence: Fraction = Field(0.95, description="Level of the bootstrap intervals.")
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples of prompts.")
    seed: int = Field(0, description="Seed of the bootstrap.")
    judges: dict[str, RewardConfig] = Field(
        {},
        description="Further rewards, by name, of the evaluation alone: training never sees them.",
        json_schema_extra=Speed,  # each has a recipe of its own
    )


class TopUpConfig(Section):
    """What the flow `top_up` adds to the references in one run."""

    standard_error: Annotated[float, Field(gt=0, lt=0.5)] | None = Field(
        None, description="Raise budgets until no quantile is less certain than this; null keeps the budgets."
    )
    max_references: PositiveInt = Field(256, description="References a prompt that precision may ask for.")
    rows_per_run: PositiveInt = Field(10_000, description="References that one run draws at most.")


class StoreConfig(Section):
    """Where artifacts live. Credentials come from the environment or the usual AWS files, never from here."""

    path: str = Field(".qrpo", description="A local directory or s3://bucket/prefix.")
    endpoint_url: str | None = Field(None, description="s3: endpoint of a server other than AWS.")
    region: str | None = Field(None, description="s3: region.")
    path_style: bool = Field(False, description="s3: bucket in the path instead of the host name.")
    rows_per_block: PositiveInt = Field(8192, description="Most rows that a block may hold.")
    block_minutes: PositiveFloat = Field(
        5.0,
        description="Minutes of work that a block should hold, at the rate measured so far: what an "
        "interruption can cost.",
    )
    verify: Literal["always", "sampled", "never"] = Field(
        "always",
        description="Check content against its digest when it is read: always, for a tenth of the blocks and "
        "files (chosen by their names), or never. A missing or unreadable object is noticed in any case.",
    )
    tries: PositiveInt = Field(
        3,
        description="How many runs ask for a row whose status can pass (endpoint_error, timeout, "
        "sandbox_error) before they take it as it is. A larger number asks again.",
    )
    retry_seconds: NonNegativeFloat = Field(
        60.0, description="s3: longest time that one call goes on trying against errors that pass."
    )


class ServiceConfig(Section):
    """What runs show beside their results. No recipe has it: changing it computes nothing again."""

    gpu_hour_price: NonNegativeFloat | None = Field(
        None,
        description="Price of one GPU for an hour: stages show what they cost; null: no costs are shown.",
    )
    currency: Annotated[str, Field(pattern=r"^[^\s|<>`]{1,8}$")] | None = Field(
        None, description="Written behind costs, such as EUR."
    )


class Experiment(Section):
    """One YAML file: everything that decides what a run computes."""

    name: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Stands in the names of runs and over the report.",
        json_schema_extra=Speed,
    )
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    vllm: VllmConfig = VllmConfig()
    endpoint: EndpointConfig = EndpointConfig()
    fake: FakeConfig = FakeConfig()
    parity: ParityConfig = ParityConfig()
    reward: RewardConfig
    training_data: TrainingDataConfig = TrainingDataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    rounds: RoundsConfig = RoundsConfig()
    top_up: TopUpConfig = TopUpConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    store: StoreConfig = StoreConfig()
    service: ServiceConfig = ServiceConfig()

    @property
    def decided_data(self) -> TrainingDataConfig:
        """`training_data` with its `preference` decided: what stands in recipes and what selection follows.

        dpo, simpo and sft follow the data set's label where it has one and no grades; qrpo and rebel fit
        rewards.
        """
        data, kind = self.training_data, self.objective.kind
        preference = data.preference
        if data.mode != "offline" or kind in ("qrpo", "rebel"):
            preference = "reward"
        elif preference == "auto":
            labelled = self.prompts.chosen_field is not None and data.rewards == "scored"
            preference = "label" if labelled else "reward"
        return data.model_copy(update={"preference": preference})

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        mode, kind = self.training_data.mode, self.objective.kind
        if self.ranks_among_samples:
            self._fits_samples()
        self._fits_truncated()
        if mode == "random" and kind != "qrpo":
            raise ValueError(
                f"objective.kind {kind!r} prefers one completion to another, and training_data.mode 'random' "
                "makes no pairs; use pairs, best_worst or offline"
            )
        if mode == "offline":
            self._fits_offline()
        if mode == "offline" and self.rounds.count > 1:
            raise ValueError("rounds.count > 1 trains on the policy's own samples; not with mode 'offline'")
        if mode == "best_worst" and self.training_data.pool is not None:
            left = self.sampling.references_per_prompt - self.training_data.pool
            if left < 1 and kind == "qrpo":
                raise ValueError(
                    f"training_data.pool {self.training_data.pool} leaves {max(left, 0)} of "
                    f"sampling.references_per_prompt {self.sampling.references_per_prompt} as references"
                )
        return self

    @property
    def ranks_among_samples(self) -> bool:
        """Whether targets come from quantiles among completions that are drawn from the policy."""
        data = self.training_data
        return self.objective.kind == "qrpo" and (data.mode != "offline" or data.references == "sampled")

    @property
    def training_temperature(self) -> float:
        """The temperature of log-probs in training and of its reference; see training.temperature."""
        if self.training.temperature is not None:
            return self.training.temperature
        sampled = self.ranks_among_samples or self.training_data.mode != "offline"
        return self.sampling.temperature if sampled else 1.0

    @property
    def truncated_reward(self) -> float | None:
        """The reward of a completion that the length limit cut; None where it keeps its own."""
        if self.training_data.truncated != "wrong":
            return None
        return self.training_data.truncated_reward or 0.0

    def _fits_truncated(self) -> None:
        data = self.training_data
        known = data.truncated_reward is not None or self.reward.kind in _WRONG_IS_ZERO
        if data.truncated == "wrong" and not known:
            raise ValueError(
                f"training_data.truncated 'wrong': of kind {self.reward.kind!r} it is not known which reward "
                "is wrong; set training_data.truncated_reward to the lowest that it gives"
            )

    def _fits_samples(self) -> None:
        """Quantiles are those of the policy that the references are drawn from: so must log-ratios be."""
        sampling, own = self.sampling, self.training.temperature
        if sampling.top_p < 1:
            raise ValueError(
                f"sampling.top_p {sampling.top_p:g} leaves out part of the policy: quantiles would be those "
                "of what is left, and log-ratios those of the whole; set sampling.top_p to 1 (a lower "
                "sampling.temperature also keeps draws to what is probable, and is trained at)"
            )
        if own is not None and own != sampling.temperature:
            raise ValueError(
                f"training.temperature {own:g} is not sampling.temperature {sampling.temperature:g}: "
                "quantiles would be those of another policy than log-ratios; leave training.temperature out"
            )

    def _fits_offline(self) -> None:
        prompts, data = self.prompts, self.training_data
        graded = bool(prompts.completion_fields)
        if not graded and prompts.chosen_field is None:
            raise ValueError(
                "training_data.mode 'offline' needs prompts.chosen_field and prompts.rejected_field, or "
                "prompts.completion_fields"
            )
        if data.preference == "label" and graded:
            raise ValueError(
                "training_data.preference 'label' needs prompts.chosen_field; grades are rewards"
            )
        if data.rewards == "given" and not prompts.graded:
            raise ValueError(
                "training_data.rewards 'given' needs prompts.completion_reward_field or "
                "prompts.chosen_reward_field"
            )
