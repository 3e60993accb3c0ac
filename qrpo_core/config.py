"""One experiment as frozen models, closed to unknown keys. Reading one from a file: experiments.py.

A field lives in the section of the step whose result it changes. A field marked `Speed` changes how
fast a result comes, not the result: it stays out of every recipe (see `recipe_fields`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qrpo_core.engines.config import EndpointConfig, FakeConfig, ParityConfig, SamplingConfig, VllmConfig
from qrpo_core.rewards.config import RewardConfig, WeightedTerm
from qrpo_core.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Speed,
    changed_fields,
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


class PromptsConfig(Section):
    """Where prompts come from, and which are held out."""

    kind: Literal["template", "reasoning_gym", "file", "hub"] = Field(
        title="Source",
        description="Where they come from. The other fields begin with the sources that they belong to.",
    )
    held_out: Fraction = Field(
        0.2, description="Share of prompts kept for evaluation; decided by prompt_id, never by row order."
    )
    system: str | None = Field(None, description="System turn put before prompts that have none.")
    limit: PositiveInt | None = Field(None, description="Take at most this many prompts, in source order.")
    # kind: template
    templates: tuple[str, ...] = Field((), description="template: sentences with {slots}.")
    words: dict[str, tuple[str, ...]] = Field({}, description="template: the words of each slot.")
    # kind: reasoning_gym
    task: str | None = Field(None, description="reasoning_gym: name of the task.")
    parameters: dict[str, Any] = Field({}, description="reasoning_gym: parameters of the task.")
    # kinds template and reasoning_gym
    size: PositiveInt | None = Field(None, description="template, reasoning_gym: number of prompts.")
    seed: int = Field(0, description="template, reasoning_gym: seed of the draw.")
    # kinds file and hub
    path: str | None = Field(None, description="file: JSONL or Parquet, local or s3://.")
    name: str | None = Field(None, description="hub: data set name (or a local data set directory).")
    revision: str | None = Field(None, description="hub: revision of the data set.")
    subset: str | None = Field(
        None, description="hub: which of the data set's configurations, if it has several."
    )
    split: str = Field("train", description="hub: which split to read.")
    streaming: bool = Field(
        False,
        description="hub: read rows as they arrive instead of downloading the whole data set first.",
        json_schema_extra=Speed,
    )
    prompt_field: str = Field("prompt", description="file, hub: a string or a list of messages.")
    reference_field: str | None = Field(None, description="file, hub: what the reward checks against.")
    reference_fields: tuple[str, ...] = Field(
        (),
        description="file, hub: columns that together are the reference, an object with their names, such as "
        "the tests of a programming problem.",
    )
    chosen_field: str | None = Field(None, description="file, hub: preferred completion or conversation.")
    rejected_field: str | None = Field(None, description="file, hub: other completion or conversation.")
    completion_fields: tuple[str, ...] = Field(
        (),
        description="file, hub: columns of further completions: each a text, a mapping, or a list of them.",
    )
    completion_text_field: str = Field(
        "text", description="file, hub: key of the text where a completion is a mapping."
    )
    completion_reward_field: str | None = Field(
        None, description="file, hub: key of its reward, a number or true/false, where it is graded."
    )

    @model_validator(mode="after")
    def _needs(self) -> PromptsConfig:
        needed = {
            "template": ("templates", "size"),
            "reasoning_gym": ("task", "size"),
            "file": ("path",),
            "hub": ("name",),
        }[self.kind]
        for field in needed:
            if not getattr(self, field):
                raise ValueError(f"prompts.{field} is missing; kind {self.kind!r} needs it")
        for field in sorted(changed_fields(self) - _prompt_fields(self.kind)):
            raise ValueError(f"prompts.{field} does not belong to kind {self.kind!r}; remove it")
        if (self.chosen_field is None) != (self.rejected_field is None):
            raise ValueError("prompts.chosen_field and prompts.rejected_field come together")
        if self.completion_fields and self.chosen_field is not None:
            raise ValueError("prompts.completion_fields and prompts.chosen_field exclude each other")
        if self.reference_field is not None and self.reference_fields:
            raise ValueError("prompts.reference_field and prompts.reference_fields exclude each other")
        self._check_completions()
        return self

    def _check_completions(self) -> None:
        for field in ("completion_reward_field", "completion_text_field"):
            if field in changed_fields(self) and not self.completion_fields:
                raise ValueError(f"prompts.{field} needs prompts.completion_fields")
        if len(set(self.completion_fields)) < len(self.completion_fields):
            raise ValueError("prompts.completion_fields names a column twice")
        if self.completion_text_field == self.completion_reward_field:
            raise ValueError("prompts.completion_text_field and prompts.completion_reward_field are one key")


def _prompt_fields(kind: str) -> set[str]:
    drawn = {"size", "seed"}
    read = {"prompt_field", "reference_field", "reference_fields", "chosen_field", "rejected_field"}
    read |= {"completion_fields", "completion_text_field", "completion_reward_field"}
    own = {
        "template": {"templates", "words"} | drawn,
        "reasoning_gym": {"task", "parameters"} | drawn,
        "file": {"path"} | read,
        "hub": {"name", "revision", "subset", "split", "streaming"} | read,
    }[kind]
    return own | {"kind", "held_out", "system", "limit"}


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

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        mode, kind = self.training_data.mode, self.objective.kind
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
        if data.rewards == "given" and prompts.completion_reward_field is None:
            raise ValueError("training_data.rewards 'given' needs prompts.completion_reward_field")
