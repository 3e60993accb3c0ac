"""Training on the grades that a data set gives its own pairs and rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.schemas import PAIRS
from qrpo_core.pipeline import pool_report
from tests.core.small_experiment import changed, fill, precompute

SIDES = ("chosen", "rejected")
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


def test_pairs_bring_their_rewards(source: dict[str, Any]) -> None:
    steps, _ = precompute(changed(source))
    rewards = steps.first.rewards.read()
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert rewards.num_rows == 3 * prompts  # the shared text once
    assert sorted(rewards["reward"].to_pylist()) == sorted([4.5, -1.0, -2.0] * prompts)
    assert set(rewards["status"].to_pylist()) == {"ok"}


def test_labels_pair_what_grades_rank(source: dict[str, Any]) -> None:
    steps, _ = precompute(changed(source, objective={"kind": "dpo"}))
    manifest = steps.workspace.artifacts.get(steps.first.quantiles_recipe)
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert manifest.facts["label_contradicts_reward"] == 0
    made = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    assert len(steps.workspace.load(made, "pairs.parquet", PAIRS)) == 2 * prompts


def test_the_pool_report_is_of_the_grades(source: dict[str, Any]) -> None:
    """A data set's own completions are a pool, whose texts judges score."""
    judges = {"judges": {"short": {"kind": "length", "max_words": 1}}}
    steps, _ = precompute(changed(source, evaluation=judges))
    pool = pool_report.pool_steps(steps)
    for step in pool.judges.values():
        fill(steps.workspace, step)
    report = pool_report.stored_report(pool_report.build(pool))
    prompts = pool.rewards.completions.prompts.num_rows
    assert report.reward == "given by the data set"
    assert (report.spread.references, report.spread.fewest) == (3 * prompts, 3)
    assert report.spread.common[0][1] == pytest.approx(1 / 3)
    agreement = report.judges["short"].agreement
    assert agreement is not None
    # "good" (4.5) is one word, "bad 1" (-1) and "bad 2" (-2) are two: it beats both, and these two tie.
    assert agreement.agreement.value == pytest.approx(2.5 / 3)
    assert agreement.ties == pytest.approx(1 / 3)


def test_labels_alone_are_no_pool(source: dict[str, Any]) -> None:
    labelled = source | {"prompts": source["prompts"] | {f"{side}_reward_field": None for side in SIDES}}
    experiment = changed(labelled | {"training_data": {"mode": "offline"}}, objective={"kind": "dpo"})
    steps, _ = precompute(experiment)
    with pytest.raises(ConfigError, match="labels alone decide"):
        pool_report.pool_steps(steps)
