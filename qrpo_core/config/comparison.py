"""What `qrpo compare` varies: a parameter of the flow beside the experiment, not a section of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qrpo_core.config.section import Fraction, Section, changed_fields

#: Trainings of a variant; a number far above it is a seed where a count was asked for.
_Repetitions = Annotated[int, Field(ge=1, le=1000)]


class ComparisonConfig(Section):
    """The variants of an experiment that are trained on one pool and compared."""

    vary: tuple[str, ...] = Field(
        (),
        description="Settings and their values, such as objective.kind=qrpo,dpo,sft. Several lines: every "
        "combination.",
    )
    variants: tuple[str, ...] = Field(
        (),
        description="Settings that belong together, such as objective.kind=simpo objective.beta=2,10. Each "
        "line is a grid of its own, combined with what `vary` names.",
    )
    seeds: _Repetitions = Field(
        3, description="Trainings of every variant: training.seed, and the seeds that follow it."
    )
    choose_on: Literal["nothing", "validation"] = Field(
        "nothing",
        description="validation: of each group, only the variant that does best on the validation prompts is "
        "trained with all seeds and compared, on the other held-out prompts. nothing: all are compared.",
    )
    choose_by: str = Field(
        "reward", description="validation: what decides, the reward of training or the name of a judge."
    )
    choose_within: tuple[str, ...] = Field(
        ("objective.kind",), description="validation: variants that share these settings are a group."
    )
    choose_seeds: _Repetitions = Field(
        1, description="validation: trainings of every variant to choose by; they are not compared later."
    )
    validation_share: Fraction = Field(
        0.5, description="validation: share of the held-out prompts that choose; by hash of the prompt."
    )

    @model_validator(mode="after")
    def _needs(self) -> ComparisonConfig:
        if not self.vary and not self.variants:
            raise ValueError("nothing varies: give vary (--vary) or variants (--variant)")
        unused = changed_fields(self) & {"choose_by", "choose_within", "choose_seeds", "validation_share"}
        if unused and self.choose_on == "nothing":
            raise ValueError(f"{', '.join(sorted(unused))}: nothing is chosen; add choose_on validation")
        return self
