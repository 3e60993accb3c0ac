"""A test set of its own: its prompts are held out, and none of them is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.common.schemas import PROMPTS
from qrpo_core.config.reading import parse_experiment
from qrpo_core.data.evaluation_prompts import with_test_set
from qrpo_core.data.sources import PromptSet, load_prompts
from qrpo_core.data.unusable import UnusableError
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.run_report import filtered
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import precompute


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def with_test(settings: dict[str, Any], rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The small experiment with these rows as its test set."""
    path = write(Path(settings["prompts"]["path"]).with_name("test.jsonl"), rows)
    own = {"kind": "file", "path": path, "ground_truth_field": "answer"}
    return settings | {
        "prompts": settings["prompts"] | {"held_out": 0} | fields,
        "evaluation": {"prompts": own},
    }


def test_all_of_the_source_is_trained_on_and_the_test_set_is_held_out(settings: dict[str, Any]) -> None:
    tests = [{"prompt": f"Ask {n}", "answer": n} for n in range(5)]
    steps, _ = precompute(parse_experiment(with_test(settings, tests)))
    rows = steps.prompts.to_pylist()
    by_split = {split: [r["messages"][0]["content"] for r in rows if r["split"] == split] for split in SPLITS}
    assert sorted(by_split["train"]) == sorted(f"Say {n}" for n in range(12))
    assert sorted(by_split["held_out"]) == [f"Ask {n}" for n in range(5)]
    assert steps.prompts.schema.equals(PROMPTS)
    asked = steps.before.samples.wanted
    assert set(asked) == {row["prompt_id"] for row in rows if row["split"] == "held_out"}


SPLITS = ("train", "held_out")


def test_the_test_sets_content_is_part_of_the_recipe_and_its_absence_is_not(settings: dict[str, Any]) -> None:
    def key(experiment: dict[str, Any]) -> str:
        return prompts.recipe(Workspace(parse_experiment(experiment))).key

    alone = key(settings | {"prompts": settings["prompts"] | {"held_out": 0.3}})
    one = key(with_test(settings, [{"prompt": "Ask 1", "answer": 1}]))
    two = key(with_test(settings, [{"prompt": "Ask 2", "answer": 1}]))
    assert len({alone, one, two}) == 3
    assert alone == key(settings)
    assert "evaluation" not in prompts.recipe(Workspace(parse_experiment(settings))).config


def test_overlaps_are_refused_with_both_places(settings: dict[str, Any]) -> None:
    tests = [{"prompt": "Ask 0", "answer": 0}, {"prompt": "Say  3\n", "answer": 3}]
    experiment = parse_experiment(with_test(settings, tests))
    with pytest.raises(UnusableError) as refused:
        prompts.read(Workspace(experiment))
    text = str(refused.value)
    assert "questions.jsonl:4" in text
    assert "test.jsonl:2 of evaluation.prompts" in text
    assert "prompts.on_unusable: skip" in text


def test_examples_before_a_prompt_hide_no_overlap(settings: dict[str, Any]) -> None:
    shown = [{"prompt": "Say 1", "completion": "1"}]
    experiment = with_test(settings, [{"prompt": "Say 3", "answer": 3}], examples=shown)
    with pytest.raises(UnusableError, match=r"questions\.jsonl:4"):
        prompts.read(Workspace(parse_experiment(experiment)))


def test_skipped_overlaps_are_tested_not_trained_on_and_named(settings: dict[str, Any]) -> None:
    tests = [{"prompt": "Ask 0", "answer": 0}, {"prompt": "Say 3", "answer": 3}]
    experiment = parse_experiment(with_test(settings, tests, on_unusable="skip"))
    (stage, *_) = [each for each in plan(Workspace(experiment)) if each.stage == "prepare prompts"]
    assert "1 also in evaluation.prompts" in stage.why
    steps, _ = precompute(experiment)
    split = {row["messages"][0]["content"]: row["split"] for row in steps.prompts.to_pylist()}
    assert split["Say 3"] == "held_out"
    assert list(split.values()).count("train") == 11
    made = steps.workspace.artifacts.get(steps.prompts_recipe)
    (row,) = [each for each in filtered(experiment, made, []) if "evaluation.prompts" in each["why"]]
    assert (row["what"], row["count"]) == ("prompts not trained on", 1)
    assert "questions.jsonl:4" in row["why"]


def test_what_does_not_fit_is_refused(settings: dict[str, Any]) -> None:
    rows = [{"prompt": "Ask 0", "answer": 0}]
    cases = [
        (changed_held_out(with_test(settings, rows), 0.2), "set prompts.held_out to 0"),
        (settings | {"prompts": settings["prompts"] | {"held_out": 0}}, "name evaluation.prompts"),
    ]
    for field, value in (("date", "2026-01-02"), ("on_unusable", "skip"), ("chosen_field", "good")):
        both = with_test(settings, rows)
        both["evaluation"]["prompts"][field] = value
        cases.append((both, f"{field}"))
    for experiment, says in cases:
        with pytest.raises(ConfigError, match=says):
            parse_experiment(experiment)
    everything = with_test(
        settings, [{"prompt": f"Say {n}", "answer": n} for n in range(12)], on_unusable="skip"
    )
    with pytest.raises(DataError, match="every training prompt"):
        prompts.read(Workspace(parse_experiment(everything)))


def changed_held_out(settings: dict[str, Any], share: float) -> dict[str, Any]:
    return settings | {"prompts": settings["prompts"] | {"held_out": share}}


@given(st.sets(st.integers(0, 15), min_size=1), st.sets(st.integers(0, 15), min_size=1), st.booleans())
def test_no_tested_conversation_is_trained_on(
    tmp_path_factory: pytest.TempPathFactory, train: set[int], test: set[int], system: bool
) -> None:
    folder = tmp_path_factory.mktemp("sets")

    def load(name: str, numbers: set[int], **fields: Any) -> PromptSet:
        path = write(folder / f"{name}.jsonl", [{"prompt": f"Say {n}"} for n in sorted(numbers)])
        settings = {"model": {"path": "x"}, "reward": {"kind": "length", "max_words": 1}}
        section = {"kind": "file", "path": path, **fields}
        test_set = {"prompts": {"kind": "file", "path": path}}
        experiment = parse_experiment(
            settings | {"prompts": section | {"held_out": 0}, "evaluation": test_set}
        )
        return load_prompts(experiment.prompts if name == "train" else experiment.evaluation.prompts)

    one = load("train", train, **({"system": "Be brief."} if system else {}))
    two = load("test", test)
    if train <= test:
        with pytest.raises(DataError):
            with_test_set(one, two, "skip")
        return
    found = with_test_set(one, two, "skip")
    last = {split: set() for split in SPLITS}
    for row in found.prompts.to_pylist():
        last[row["split"]].add(row["messages"][-1]["content"])
    assert last["train"] == {f"Say {n}" for n in train - test}
    assert last["held_out"] == {f"Say {n}" for n in test}
    counts = found.counts
    assert (counts["train"], counts["held_out"]) == (len(train - test), len(test))
    assert counts["prompts"] == len(found.prompts)
    assert len(found.overlap) == counts.get("in_evaluation_prompts", 0) == len(train & test)
