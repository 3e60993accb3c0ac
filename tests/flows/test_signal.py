"""What training follows and what stops it, through the real flows: labels, and rewards that say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.errors import ObjectiveError, QRPOError
from qrpo_core.common.hashing import prompt_id, split_fraction
from qrpo_core.config import Experiment, PromptsConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.result import report_path, result_lines, results
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import count_rows

pytestmark = pytest.mark.slow

PAIRS, HELD_OUT = 20, 4


def questions() -> Iterator[str]:
    """Prompts of which PAIRS are trained on and HELD_OUT held out, with the default share."""
    left = {"train": PAIRS, "held_out": HELD_OUT}
    share = PromptsConfig.model_fields["held_out"].default
    for number in count():
        question = f"Say {number}"
        fraction = split_fraction(prompt_id([{"role": "user", "content": question}]))
        split = "held_out" if fraction < share else "train"
        if left[split]:
            left[split] -= 1
            yield question
        if not any(left.values()):
            return


def experiment(model: Path, folder: Path, **sections: dict[str, Any]) -> Experiment:
    """Chosen/rejected pairs whose labels the reward contradicts or cannot tell apart."""
    rows = [
        {"prompt": question, "chosen": "w w w" if at % 2 else "w w", "rejected": "v v"}
        for at, question in enumerate(questions())
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "name": "labels",
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "kind": "file",
            "path": str(folder / "pairs.jsonl"),
            "chosen_field": "chosen",
            "rejected_field": "rejected",
        },
        "sampling": {"engine": "fake", "references_per_prompt": 4, "max_new_tokens": 8},
        "reward": {"kind": "length", "max_words": 2},
        "training_data": {"mode": "offline"},
        "training": {"precision": "fp32", "batch_size": 8},
        "evaluation": {"samples_per_prompt": 1, "resamples": 100},
        "store": {"path": str(folder / "store")},
    }
    return parse_experiment({**settings, **sections})


def run(wanted: Experiment) -> dict[str, Any]:
    from flows.align import align

    return {stage.stage: stage for stage in align(wanted)}


def has(folder: Path, step: str) -> bool:
    """Whether the store holds an artifact of a step."""
    return (folder / "store" / "artifacts" / step).exists()


def test_twenty_labelled_pairs_train_on_twenty(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    names = {"dpo": "DPO", "simpo": "SimPO", "sft": "SFT"}
    for kind, name in names.items():
        wanted = experiment(long_model, tmp_path, objective={"kind": kind})
        stages = run(wanted)
        assert "annotate offline completions" not in stages
        workspace = Workspace(wanted)
        made = results(workspace)
        assert made.train.facts["rows"] == PAIRS
        items = "completions" if kind == "sft" else "pairs"
        line = f"{name} was trained on {PAIRS} {items}, preferred by the data set's labels."
        page = report_path(workspace).read_text(encoding="utf-8")
        assert line in result_lines(workspace)
        assert line.replace("'", "&#39;") in page
        assert f"{name} report: labels" in page
        card = (workspace.artifacts.folder(made.train, "policy") / "README.md").read_text()
        assert f"with {name} (" in card
        assert f"on {PAIRS} {items}" in card
        for text in (page, card):
            assert "QRPO" not in text
            assert "reward units" not in text


@pytest.mark.long
def test_rewards_against_the_labels_stop_and_may_be_followed(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    by_reward = {"mode": "offline", "preference": "reward"}
    asked = experiment(long_model, tmp_path, objective={"kind": "dpo"}, training_data=by_reward)
    with pytest.raises(ObjectiveError, match=r"contradict the data set's labels on \d+ of 20 pairs"):
        run(asked)
    assert not has(tmp_path, "train")
    followed = by_reward | {"max_contradicted": 1.0}
    asked = experiment(long_model, tmp_path, objective={"kind": "dpo"}, training_data=followed)
    stages = run(asked)
    assert stages["annotate offline completions"].computed == 0  # they are there
    first, *_ = (line for line in result_lines(Workspace(asked)) if line.startswith("Warning: "))
    assert "contradict the data set's labels" in first


def test_a_constant_reward_stops_before_log_probs_and_training(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    words = {"templates": ["Say {w}"], "words": {"w": [f"item {n}" for n in range(12)]}, "size": 12}
    wanted = experiment(
        long_model,
        tmp_path,
        prompts={"kind": "template", **words},
        reward={"kind": "length", "max_words": 10_000},
        training_data={},
    )
    from flows.precompute import precompute

    for flow in (run, precompute):
        with pytest.raises(ObjectiveError, match=r"no signal: on each of \d+ prompts all rewards are equal"):
            flow(wanted)
    first = stored_steps(Workspace(wanted)).first
    assert not has(tmp_path, "train")
    assert not Workspace(wanted).blocks.committed(first.logprobs.recipe)


def test_a_reward_that_always_raises_ends_before_the_bulk_is_drawn(
    server: PrefectServer, long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_that_raises.py").write_text("def score(batch):\n    raise KeyError('gold')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"kind": "python", "python": {"function": "reward_that_raises:score"}}
    wanted = experiment(long_model, tmp_path, reward=reward)
    with pytest.raises(QRPOError, match=r"fails on each of the first 8 rows: .*KeyError: 'gold'"):
        run(wanted)
    workspace = Workspace(wanted)
    samples, rewards, *_ = stored_steps(workspace).first.row_steps
    assert sum(block.rows for block in workspace.blocks.committed(samples.recipe)) == 8
    assert not workspace.blocks.committed(rewards.recipe)
    assert count_rows(samples.wanted) > 8


def test_rows_taken_ahead_are_counted_once_by_their_stages(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    from flows.precompute import precompute

    wanted = experiment(long_model, tmp_path, training_data={"mode": "offline", "max_contradicted": 1.0})
    stages = {stage.stage: stage for stage in precompute(wanted)}
    for name, rows in (("sample references", 4 * PAIRS), ("annotate references", 4 * PAIRS)):
        assert (stages[name].computed, stages[name].reused) == (rows, 0)
