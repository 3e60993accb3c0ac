"""Training on the grades that a data set gives its own pairs and rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.records import PAIRS
from qrpo_core.steps.tables import load

PAIRED = {"chosen_field": "c", "rejected_field": "r"}
GRADED = PAIRED | {"chosen_reward_field": "s", "rejected_reward_field": "-t"}


@pytest.fixture
def source(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Twelve prompts with two pairs each, which share their chosen text; `t` grades the other way round."""
    rows = [
        {"prompt": f"Say {n}", "c": "good", "r": f"bad {k}", "s": 4.5, "t": str(k)}
        for n in range(12)
        for k in (1, 2)
    ]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"kind": "file", "path": str(tmp_path / "given.jsonl"), "held_out": 0.3}
    data = {"mode": "offline", "rewards": "given", "references": "offline"}
    return {
        **settings,
        "prompts": prompts | GRADED,
        "training_data": data,
        "reward": {"kind": "length", "max_words": 5},
    }


def test_pairs_bring_their_rewards(steps: Any, source: dict[str, Any]) -> None:
    chain, _ = steps.precompute(steps.changed(source))
    rewards = chain.first.rewards.read()
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert rewards.num_rows == 3 * prompts  # the shared text once
    assert sorted(rewards["reward"].to_pylist()) == sorted([4.5, -1.0, -2.0] * prompts)
    assert set(rewards["status"].to_pylist()) == {"ok"}


def test_labels_pair_what_grades_rank(steps: Any, source: dict[str, Any]) -> None:
    chain, _ = steps.precompute(steps.changed(source, objective={"kind": "dpo"}))
    manifest = chain.workspace.artifacts.get(chain.first.quantiles)
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert manifest.facts["label_contradicts_reward"] == 0
    made = chain.workspace.artifacts.get(chain.first.training_set)
    assert len(load(chain.workspace, made, "pairs.parquet", PAIRS)) == 2 * prompts
