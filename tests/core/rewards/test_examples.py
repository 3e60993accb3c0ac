"""docs/how-to: every kind of reward has an example that is a valid section, and the function in it runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import Kind
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import make_reward

DOCS = Path(__file__).parents[3] / "docs" / "how-to"
PAGES = [
    *sorted(DOCS.glob("*-rewards.md")),
    DOCS / "reward-models.md",
    DOCS / "judges.md",
    DOCS / "paper-evaluations.md",
    DOCS / "rewards.md",
]
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def examples() -> dict[str, RewardConfig]:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S)]
    found = [block["reward"] for block in blocks if "reward" in block]
    return {section["kind"]: RewardConfig.model_validate(section) for section in reversed(found)}


def test_every_kind_has_an_example() -> None:
    shown = examples()
    inside = {term.reward.kind for term in shown["weighted"].terms}
    assert {*shown, *inside} == set(get_args(Kind))


def test_the_judge_of_the_example_can_be_made() -> None:
    make_reward(examples()["judge"]).close()


def test_the_function_of_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    requests = [
        RewardRequest("p", row, (("user", "Q"),), text, None)
        for row, text in enumerate(["Yes, please.", "", "No.", "please " * 60])
    ]
    scores = make_reward(examples()["python"]).score(requests)
    assert [score.reward for score in scores] == [1.0, None, 0.0, 0.5]
    assert scores[1].detail == "the function gave no score: an empty completion"
