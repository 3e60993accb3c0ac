"""The benchmarks of the section `evaluation`: prompts of their own, and how answers to them are scored."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from qrpo_core.config.engines import SamplingConfig
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.config.rewards import RewardConfig
from qrpo_core.config.section import NonNegativeFloat, PositiveInt, Section


def _is_a_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) is None:
        raise ValueError(
            f"evaluation.benchmarks: {value!r} is no name; write letters, digits, '.', '_' and '-'"
        )
    return value


#: Names of benchmarks, which stand in names of stages. Not by a pattern: forms would show another field.
BenchmarkName = Annotated[str, AfterValidator(_is_a_name)]

#: top_p of temperature 0: the smallest set of tokens that holds this mass is the most probable one, since
#: it has at least 1 / vocabulary.
GREEDY_TOP_P = 1e-6


class EvaluationPromptsConfig(PromptsConfig):
    """Prompts that are only evaluated on."""

    held_out: Literal[1] = Field(1, description="Always 1: all of these prompts are evaluated on.")

    @model_validator(mode="after")
    def _have_no_completions(self) -> EvaluationPromptsConfig:
        for field in ("chosen_field", "completion_fields"):
            if getattr(self, field):
                raise ValueError(
                    f"prompts.{field} does not belong to prompts that are evaluated on; remove it"
                )
        return self


class BenchmarkConfig(Section):
    """One benchmark: both policies answer its prompts, and a reward scores the answers."""

    prompts: EvaluationPromptsConfig
    reward: RewardConfig
    samples_per_prompt: PositiveInt = Field(1, description="Completions of every prompt by each policy.")
    temperature: NonNegativeFloat = Field(
        0.0, description="Temperature of its completions; 0 takes the most probable token at each step."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Mass of the distribution that completions are drawn from; not with temperature 0."
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="Longest completion in tokens; null: sampling.max_new_tokens."
    )
    length_controlled: bool = Field(
        True,
        description="reward.kind alpaca_eval: also give the length-controlled win rate. It is defined for "
        "AlpacaEval's own prompts, and its data comes from the hub.",
    )

    @property
    def controls_length(self) -> bool:
        """Whether the length-controlled win rate is wanted."""
        return self.reward.kind == "alpaca_eval" and self.length_controlled

    def sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        """The settings by which its completions are drawn, from those of the experiment."""
        greedy = self.temperature == 0
        return sampling.model_copy(
            update={
                "temperature": 1.0 if greedy else self.temperature,
                "top_p": GREEDY_TOP_P if greedy else self.top_p,
                "max_new_tokens": self.max_new_tokens or sampling.max_new_tokens,
            }
        )

    @model_validator(mode="after")
    def _fits(self) -> BenchmarkConfig:
        if self.temperature == 0 and (self.samples_per_prompt > 1 or self.top_p < 1):
            raise ValueError(
                "evaluation.benchmarks: temperature 0 gives one completion a prompt: leave samples_per_prompt"
                " and top_p out, or set temperature"
            )
        if self.reward.kind == "alpaca_eval" and self.samples_per_prompt > 1:
            raise ValueError("evaluation.benchmarks: samples_per_prompt is 1 with reward.kind alpaca_eval")
        if self.reward.kind != "alpaca_eval" and not self.length_controlled:
            raise ValueError(
                "evaluation.benchmarks: length_controlled belongs to reward.kind alpaca_eval; remove it"
            )
        return self
