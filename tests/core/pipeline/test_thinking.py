"""A template that opens the thinking in its generation prompt is known to the reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.pipeline.learning_signal import remarked
from qrpo_core.pipeline.row_steps import RewardStep
from qrpo_core.rewards.thinking import UNFINISHED
from tests.core.small_experiment import changed, precompute

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>OPENING{% endif %}"
)


@pytest.mark.parametrize(("opening", "unfinished"), [("<think>\n", True), ("<think>\n\n</think>\n", False)])
def test_an_answer_cut_while_the_template_has_the_thinking_open(
    settings: dict[str, Any],
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
    opening: str,
    unfinished: bool,
) -> None:
    model = make_tiny_model(tmp_path / "thinker", template=TEMPLATE.replace("OPENING", opening))
    steps, _ = precompute(
        changed(settings, model={"path": str(model)}, reward={"min_words": 1, "max_words": 1000})
    )
    rewards = steps.first.rewards
    assert isinstance(rewards, RewardStep)
    assert remarked(rewards.read())["unfinished_thinking"] == (rewards.read().num_rows if unfinished else 0)
    rows = rewards.read().to_pylist()
    assert rows
    assert {row["detail"] for row in rows} == {UNFINISHED if unfinished else ""}
    assert ({row["reward"] for row in rows} == {0.0}) is unfinished
