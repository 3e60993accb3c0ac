"""The completions of a step joined with their rewards, as an evaluation reads them."""

from __future__ import annotations

import pyarrow as pa

from qrpo_core.common.schemas import COMPLETIONS
from qrpo_core.evaluation.inputs import EVALUATED
from qrpo_core.pipeline.row_steps import RewardStep


def joined_rewards(rewards: RewardStep) -> pa.Table:
    """EVALUATED rows: every completion with its reward and status."""
    # Both reads come in the order of the same prompts and indices, each row once.
    drawn = rewards.completions
    completions = drawn.workspace.blocks.read(drawn.recipe, drawn.wanted, COMPLETIONS)
    scores = rewards.read()
    if not completions.select(["prompt_id", "sample_index"]).equals(
        scores.select(["prompt_id", "sample_index"])
    ):
        raise AssertionError("completions and rewards of one step are not aligned")
    joined = completions.append_column("reward", scores["reward"]).append_column("status", scores["status"])
    return joined.select(EVALUATED.names)
