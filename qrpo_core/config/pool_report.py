"""The section of the pool report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qrpo_core.config.section import PositiveInt, Section


class PoolReportConfig(Section):
    """What each judge of the evaluation scores for the pool report; a larger number keeps the scored rows."""

    prompts: PositiveInt = Field(
        200, description="Training prompts whose completions judges score, among those with unequal rewards."
    )
    completions_per_prompt: Annotated[int, Field(ge=2)] = Field(
        8, description="Completions of each of these prompts, the first by sample_index."
    )
