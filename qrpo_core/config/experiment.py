"""The experiment: all sections of one YAML file as frozen models, closed to unknown keys.

A field lives in the section of the step whose result it changes. A field marked `NOT_IN_CACHE_KEY`
changes speed, place or presentation, not the result: it stays out of every recipe (see `cache_key_fields`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qrpo_core.config.benchmarks import BenchmarkConfig, BenchmarkName, EvaluationPromptsConfig
from qrpo_core.config.engines import EndpointConfig, FakeConfig, ParityConfig, SamplingConfig, VllmConfig
from qrpo_core.config.objective import ObjectiveConfig
from qrpo_core.config.pool_report import PoolReportConfig
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.config.rewards import RewardConfig
from qrpo_core.config.section import (
    NOT_IN_CACHE_KEY,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    TemplateVariables,
)
from qrpo_core.config.training import RoundsConfig, TrainingConfig, TrainingDataConfig

#: Kinds of reward whose lowest reward, for a wrong answer, is 0.
_WRONG_IS_ZERO = ("number", "exact", "math", "code", "reasoning_gym")


class ModelConfig(Section):
    """The reference model: training starts from it."""

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
        description="Variables of the chat template besides the messages, such as enable_thinking: false.",
    )


class EvaluationConfig(Section):
    """Held-out comparison of the trained policy with the reference model."""

    samples_per_prompt: PositiveInt = Field(
        4, description="Completions of every held-out prompt by each of the two policies."
    )
    confidence: Fraction = Field(0.95, description="Level of the bootstrap intervals.")
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples of prompts.")
    seed: int = Field(0, description="Seed of the bootstrap.")
    judges: dict[str, RewardConfig] = Field(
        {},
        description="Further rewards, by name, for the evaluation only; training never uses them.",
        json_schema_extra=NOT_IN_CACHE_KEY,  # each judge has its own recipe
    )
    benchmarks: dict[BenchmarkName, BenchmarkConfig] = Field(
        {},
        description="Benchmarks, by name, that both policies are tried on; see "
        "docs/how-to/paper-evaluations.md.",
        json_schema_extra=NOT_IN_CACHE_KEY,  # each benchmark has its own recipes
    )
    prompts: EvaluationPromptsConfig | None = Field(
        None,
        description="A test set of its own, read like `prompts`: the held-out prompts are these, and "
        "prompts.held_out is 0. null: a share of `prompts` is held out.",
        json_schema_extra=NOT_IN_CACHE_KEY,  # the recipe of the prompts has it
    )


class TopUpConfig(Section):
    """The references that the flow `top_up` adds in one run."""

    standard_error: Annotated[float, Field(gt=0, lt=0.5)] | None = Field(
        None,
        description="Largest standard error of a quantile; budgets grow until it holds. null: budgets stay.",
    )
    max_references: PositiveInt = Field(
        256, description="Largest number of references of a prompt for the sake of standard_error."
    )
    rows_per_run: PositiveInt = Field(10_000, description="Largest number of references that one run draws.")


class StoreConfig(Section):
    """The store of all results. Credentials come from the environment or the usual AWS files only."""

    path: str = Field(".qrpo", description="A local directory or s3://bucket/prefix.")
    endpoint_url: str | None = Field(None, description="s3: endpoint of a server other than AWS.")
    region: str | None = Field(None, description="s3: region.")
    path_style: bool = Field(False, description="s3: bucket in the path instead of the host name.")
    rows_per_block: PositiveInt = Field(8192, description="Largest number of rows of a block.")
    block_minutes: PositiveFloat = Field(
        5.0,
        description="Longest work in a block, in minutes. At the start of a stage blocks are shorter: half "
        "of the time that the stage has taken so far. An interruption costs at most one block.",
    )
    verify: Literal["always", "sampled", "never"] = Field(
        "always",
        description="Compare content with its digest on read: always, for a tenth of the blocks and files "
        "(chosen by their names), or never. A missing or unreadable object is always an error.",
    )
    tries: PositiveInt = Field(
        3,
        description="How many runs compute a row with a retryable status (endpoint_error, timeout, "
        "sandbox_error) before it stays without a reward. A larger number retries such rows.",
    )
    retry_seconds: NonNegativeFloat = Field(
        60.0, description="s3: longest time that one call retries after retryable errors."
    )


class ServiceConfig(Section):
    """Price, cap and display of runs. No recipe holds them: changing them computes nothing again."""

    gpu_hour_price: NonNegativeFloat | None = Field(
        None,
        description="Price of one GPU for an hour, for the costs that stages show; null: no costs.",
    )
    max_gpu_hours: PositiveFloat | None = Field(
        None,
        description="A run stops after the block or optimiser step in which it has spent so many GPU hours; "
        "the next run goes on. null: no cap.",
    )
    currency: Annotated[str, Field(pattern=r"^[^\s|<>`]{1,8}$")] | None = Field(
        None, description="Currency behind costs, such as EUR."
    )


class Experiment(Section):
    """One YAML file: all settings of a run."""

    name: str = Field(
        "experiment",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name in the UI's runs and the title of the report.",
        json_schema_extra=NOT_IN_CACHE_KEY,
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
    pool_report: PoolReportConfig = PoolReportConfig()
    store: StoreConfig = StoreConfig()
    service: ServiceConfig = ServiceConfig()

    @property
    def decided_data(self) -> TrainingDataConfig:
        """`training_data` with its final `preference`, as in recipes and in selection.

        dpo, simpo and sft follow the data set's labels if it has labels and no grades; the other objectives
        fit rewards.
        """
        data = self.training_data
        preference = data.preference
        if data.mode != "offline" or self.objective.fits_rewards:
            preference = "reward"
        elif preference == "auto":
            labelled = self.prompts.chosen_field is not None and data.rewards == "scored"
            preference = "label" if labelled else "reward"
        return data.model_copy(update={"preference": preference})

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        mode, objective = self.training_data.mode, self.objective
        self._fits_test_set()
        if self.ranks_among_samples:
            self._fits_samples()
        self._fits_truncated()
        if self.training_data.reference_logprobs == "sampler":
            self._fits_sampler_logprobs()
        if mode == "random" and not objective.has_targets:
            raise ValueError(
                f"objective.kind {objective.kind!r} prefers one completion to another, and "
                "training_data.mode 'random' makes no pairs; use pairs, best_worst, offline or mixed"
            )
        if self.training_data.uses_data_set:
            self._fits_offline()
            if self.rounds.count > 1:
                raise ValueError(
                    f"rounds.count > 1 trains on the policy's own samples; not with mode {mode!r}"
                )
        if mode == "best_worst" and self.training_data.pool is not None:
            left = self.sampling.references_per_prompt - self.training_data.pool
            if left < 1 and objective.has_targets:
                raise ValueError(
                    f"training_data.pool {self.training_data.pool} leaves {max(left, 0)} of "
                    f"sampling.references_per_prompt {self.sampling.references_per_prompt} as references"
                )
        return self

    def _fits_test_set(self) -> None:
        test, share = self.evaluation.prompts, self.prompts.held_out
        if test is None and share == 0:
            raise ValueError(
                "prompts.held_out 0 leaves nothing to evaluate on; raise it, or name evaluation.prompts"
            )
        if test is None:
            return
        if 0 < share < 1:
            raise ValueError(
                f"evaluation.prompts are the held-out prompts, and prompts.held_out {share:g} would hold out "
                "others; set prompts.held_out to 0"
            )
        for field in ("date", "on_unusable"):
            if getattr(test, field) != PromptsConfig.model_fields[field].default:
                raise ValueError(f"evaluation.prompts.{field}: prompts.{field} counts for both; remove it")

    def of_benchmark(self, name: str) -> Experiment:
        """The experiment of a benchmark's rows: its prompts, its reward, its sampling; no judges."""
        wanted = self.evaluation.benchmarks[name]
        evaluation = self.evaluation.model_copy(
            update={
                "samples_per_prompt": wanted.samples_per_prompt,
                "judges": {},
                "benchmarks": {},
                "prompts": None,
            }
        )
        return self.model_copy(
            update={
                "prompts": wanted.prompts,
                "sampling": wanted.sampling(self.sampling),
                "reward": wanted.reward,
                "evaluation": evaluation,
            }
        )

    @property
    def ranks_among_samples(self) -> bool:
        """Whether targets come from quantiles among completions of the policy."""
        data = self.training_data
        return self.objective.has_targets and (data.mode != "offline" or data.references == "sampled")

    @property
    def training_temperature(self) -> float:
        """The temperature of the policy's and the reference model's log-probs; see training.temperature."""
        if self.training.temperature is not None:
            return self.training.temperature
        sampled = self.ranks_among_samples or self.training_data.mode != "offline"
        return self.sampling.temperature if sampled else 1.0

    @property
    def truncated_reward(self) -> float | None:
        """The reward of a completion that the length limit cut; None if it keeps its own."""
        if self.training_data.truncated != "wrong":
            return None
        return self.training_data.truncated_reward or 0.0

    def _fits_truncated(self) -> None:
        data = self.training_data
        known = data.truncated_reward is not None or self.reward.kind in _WRONG_IS_ZERO
        if data.truncated == "wrong" and not known:
            raise ValueError(
                f"training_data.truncated 'wrong': kind {self.reward.kind!r} has no known reward of a wrong "
                "answer; set training_data.truncated_reward to the lowest reward"
            )

    def _fits_samples(self) -> None:
        """Refuse settings with which quantiles and log-ratios belong to different policies."""
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

    def _fits_sampler_logprobs(self) -> None:
        """Refuse the sampler's log-probs at another temperature than 1, and where no target measures them."""
        objective, temperature = self.objective, self.training_temperature
        if not objective.has_targets:
            raise ValueError(
                "training_data.reference_logprobs 'sampler' is accepted by the spread of the targets, "
                f"which objective.kind {objective.kind!r} lacks; set "
                "training_data.reference_logprobs to policy"
            )
        if temperature != 1:
            raise ValueError(
                f"training_data.reference_logprobs 'sampler': engines give log-probs at temperature 1, and "
                f"training is at {temperature:g}; set training_data.reference_logprobs to policy"
            )

    def _fits_offline(self) -> None:
        prompts, data = self.prompts, self.training_data
        graded = bool(prompts.completion_fields)
        if not graded and prompts.chosen_field is None:
            raise ValueError(
                f"training_data.mode {data.mode!r} needs prompts.chosen_field and prompts.rejected_field, or "
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
