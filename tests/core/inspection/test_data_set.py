"""`qrpo export`: `datasets` itself reads the folder, and its rows are those of the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.common.schemas import TRAINING_SET
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.completion_rows import JOINED
from qrpo_core.inspection.data_set import export
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute
from tests.core.stores import REWARD, fill


def load(folder: Path, table: str, split: str) -> datasets.Dataset:
    """A table by the real library, offline and with a cache of its own."""
    return datasets.load_dataset(
        str(folder), table, split=split, cache_dir=str(folder.parent / f"cache-{folder.name}")
    )


def test_the_training_set_has_the_texts_and_the_trainers_own_targets(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    steps, _ = precompute(changed(settings | {"reward": REWARD}, objective={"beta": 0.3}))
    workspace = steps.workspace
    made = export(workspace, tmp_path / "out" / "data")
    found = load(made.folder, "training_set", "train")
    data = derive(workspace, workspace.artifacts.get(steps.first.training_set_recipe))
    assert data.targets is not None
    assert len(found) == made.rows["training_set", "train"] == len(data.table)
    for name in TRAINING_SET.names:
        assert found[name][:] == data.table[name].to_pylist(), name
    np.testing.assert_array_equal(found["quantile"][:], data.targets.quantile)
    np.testing.assert_array_equal(found["target"][:], data.targets.target)
    np.testing.assert_array_equal(found["log_ratio_target"][:], data.targets.target / data.targets.beta)
    turns = {row["prompt_id"]: row["messages"] for row in steps.prompts.to_pylist()}
    drawn = {(row["prompt_id"], row["sample_index"]): row["text"] for row in drawn_rows(steps)}
    for row in found:
        assert row["messages"] == turns[row["prompt_id"]]
        assert row["text"] == drawn[row["prompt_id"], row["sample_index"]]


def drawn_rows(steps: Any) -> list[dict[str, Any]]:
    step = steps.first.row_steps[0]
    return steps.workspace.blocks.read(step.recipe, step.wanted, step.schema).to_pylist()


def test_completions_and_judgements_after_a_whole_run(
    settings: dict[str, Any], tmp_path: Path, stages: Callable[[Experiment], Iterator[str]]
) -> None:
    judges = {"short": {"kind": "length", "max_words": 2}}
    experiment = changed(settings, evaluation={"samples_per_prompt": 2, "judges": judges})
    for _ in stages(experiment):
        pass
    workspace = Workspace(experiment)
    steps = stored_steps(workspace)
    made = export(workspace, tmp_path / "data")
    assert set(made.rows) == {
        ("training_set", "train"),
        ("completions", "train"),
        ("completions", "held_out"),
        ("judgements", "held_out"),
    }
    assert {path.name for path in tmp_path.glob("*data*")} == {"data"}  # no leftover of the writing
    references = load(made.folder, "completions", "train")
    assert set(references["source"]) == {"references"}
    scored = {
        (r["prompt_id"], r["sample_index"]): r["reward"] for r in steps.first.rewards.read().to_pylist()
    }
    assert {(r["prompt_id"], r["sample_index"]): r["reward"] for r in references} == scored
    assert all(row["quantile"] is not None and row["ref_logprob"] is not None for row in references)
    held_out = load(made.folder, "completions", "held_out")
    assert sorted(set(held_out["source"])) == ["held-out, after", "held-out, before"]
    for row in held_out:
        after = row["source"] == "held-out, after"
        assert (row["policy_logprob"] is not None) is after
        assert row["quantile"] is None
        assert row["split"] == "held_out"
    judged = load(made.folder, "judgements", "held_out")
    assert len(judged) == len(held_out)
    assert set(judged["judge"]) == {"short"}
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} | " in card for name in JOINED.names)


def test_the_data_sets_own_completions_and_preferences_with_their_turns(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": f"yes {n}", "bad": f"no {n}"} for n in range(12)]
    Path(settings["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = {"chosen_field": "good", "rejected_field": "bad"}
    experiment = changed(
        settings,
        prompts=settings["prompts"] | pairs,
        training_data={"mode": "offline"},
        objective={"kind": "dpo"},
    )
    steps, _ = precompute(experiment)
    made = export(steps.workspace, tmp_path / "data")
    found = load(made.folder, "preferences", "train")
    assert len(found) == len(steps.first.rewards.completions.prompts)
    for row in found:
        (turn,) = row["prompt"]
        number = turn["content"].removeprefix("Say ")
        assert row["chosen"] == [{"role": "assistant", "content": f"yes {number}"}]
        assert row["rejected"] == [{"role": "assistant", "content": f"no {number}"}]
        assert row["reward_chosen"] is None
    own = load(made.folder, "completions", "train")
    assert sorted(own["text"]) == sorted(
        text for row in found for text in (row["chosen"][0]["content"], row["rejected"][0]["content"])
    )
    assert set(own["status"]) == {None}
    assert load(made.folder, "training_set", "train")["target"][:] == [None] * 2 * len(found)


def test_an_unfinished_pool_is_exported_as_far_as_it_is_stored(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    workspace = Workspace(parse_experiment(settings))
    prompts.build(workspace, prompts.recipe(workspace))
    with pytest.raises(MissingError, match="no completion to export yet"):
        export(workspace, tmp_path / "none")
    steps = stored_steps(workspace)
    samples, rewards = steps.first.row_steps
    fill(workspace, samples)
    (first, *_) = workspace.blocks.plan(rewards.recipe, rewards.wanted, 5)
    table, facts = rewards.compute(first, lambda count: None)
    workspace.blocks.commit(first, table, rewards.schema, 1.0, **facts)
    made = export(workspace, tmp_path / "data")
    assert set(made.rows) == {("completions", "train")}
    found = load(made.folder, "completions", "train")
    assert sum(status == "ok" for status in found["status"]) == first.rows
    assert sum(reward is None for reward in found["reward"]) == len(found) - first.rows


def test_an_existing_directory_is_refused_and_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    steps, _ = precompute(parse_experiment(settings))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    with pytest.raises(QRPOError, match="exists already"):
        export(steps.workspace, tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(QRPOError, match="cannot be written"):
        export(steps.workspace, tmp_path / "file" / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]


def test_every_exported_column_says_what_it_is() -> None:
    from qrpo_core.inspection import data_set

    for schema in (JOINED, data_set.TRAINED, data_set.PREFERENCES, data_set.JUDGED):
        assert isinstance(schema, pa.Schema)
        assert all(field.metadata[b"about"] for field in schema)
