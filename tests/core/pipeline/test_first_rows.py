"""A few rows before the bulk: which, what of their rewards ends a run, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import QRPOError
from qrpo_core.common.schemas import COMPLETIONS, REWARDS
from qrpo_core.pipeline import first_rows, prompts
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.shards import ShardStep, split
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import count_rows, missing_ranges
from tests.core.small_experiment import changed, fill, write_questions
from tests.core.stores import reward_rows

FUNCTIONS = """
def broken(batch):
    raise KeyError("answer_key")

def half(batch):
    return [None if row.sample_index % 2 else 1.0 for row in batch]

def fails_first(batch):
    return [None if row.sample_index == 0 else float(len(row.completion)) for row in batch]
"""


def steps_of(settings: dict[str, Any], **sections: Any) -> ExperimentSteps:
    settings = {**settings, "store": settings["store"] | {"rows_per_block": 8192}}
    workspace = Workspace(changed(settings, **sections))
    prompts.build(workspace, prompts.recipe(workspace))
    return stored_steps(workspace)


def python(folder: Path, name: str) -> dict[str, Any]:
    """A reward section, whose module is called as its folder is: modules of other tests stay apart."""
    module = f"reward_{name}_{folder.name}".replace("-", "_")
    (folder / f"{module}.py").write_text(FUNCTIONS)
    return {"kind": "python", "python": {"function": f"{module}:{name}"}}


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 9).map(range), max_size=12), st.integers(1, 9)
)
def test_the_rows_are_spread_over_prompts(wanted: dict[str, range], rows: int) -> None:
    found = first_rows._first_rows(wanted, rows)
    first = {key: wanted[key] for key in list(wanted)[:rows]}
    assert count_rows(found) == min(rows, count_rows(first))
    for indices in found.values():
        assert indices == list(range(len(indices)))
    counts = [len(found.get(key, ())) for key in first]
    fullest = max(counts, default=0)
    assert all(count >= min(fullest - 1, len(first[key])) for count, key in zip(counts, first, strict=True))


def test_a_few_samples_and_their_rewards_come_first_and_once(settings: dict[str, Any]) -> None:
    first = steps_of(settings).first
    samples, rewards = first.row_steps
    drawn, scored = first_rows.first_rows_steps(samples)
    assert count_rows(drawn.wanted) == count_rows(scored.wanted) == first_rows.ROWS
    assert fill(first.workspace, drawn) == fill(first.workspace, scored) == first_rows.ROWS
    assert (
        first_rows.first_rows_steps(samples) == first_rows.first_rows_steps(rewards) == ()
    )  # rows have been scored
    rest = count_rows(samples.wanted) - first_rows.ROWS
    assert [fill(first.workspace, step) for step in (samples, rewards)] == [rest, rest]
    for step, schema in ((samples, COMPLETIONS), (rewards, REWARDS)):
        assert missing_ranges(step.wanted, first.workspace.blocks.committed(step.recipe)) == []
        first.workspace.blocks.read(step.recipe, step.wanted, schema)


def test_two_runs_at_once_try_different_rows(settings: dict[str, Any], tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.jsonl", list(range(300)))
    samples = steps_of(settings).first.row_steps[0]
    tried = [first_rows.first_rows_steps(samples)[0].wanted for _ in range(2)]
    assert tried[0] != tried[1]


def test_the_few_rows_say_nothing_of_the_rate(settings: dict[str, Any]) -> None:
    first = steps_of(settings).first
    drawn, _ = first_rows.first_rows_steps(first.row_steps[0])
    fill(first.workspace, drawn)
    assert first.workspace.blocks.rate(drawn.recipe) is None
    fill(first.workspace, first.row_steps[0])
    assert first.workspace.blocks.rate(drawn.recipe) is not None


def test_a_reward_that_always_raises_ends_the_run_and_keeps_the_samples(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    first = steps_of({**settings, "reward": python(tmp_path, "broken")}).first
    samples, rewards = first.row_steps
    drawn, scored = first_rows.first_rows_steps(samples)
    fill(first.workspace, drawn)
    with pytest.raises(
        QRPOError, match=r"fails on each of the first 8 rows: .*KeyError: 'answer_key'"
    ) as found:
        fill(first.workspace, scored)
    assert "\n" not in str(found.value)
    assert first.workspace.blocks.committed(rewards.recipe) == []
    drawn_again, _ = first_rows.first_rows_steps(samples)
    assert missing_ranges(drawn_again.wanted, first.workspace.blocks.committed(samples.recipe)) == []


@pytest.mark.parametrize("name", ["half", "fails_first"])
def test_a_reward_that_scores_some_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Even where every prompt's first sample fails: seven prompts give an eighth row that is a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_questions(tmp_path / "questions.jsonl", list(range(9)))
    first = steps_of({**settings, "reward": python(tmp_path, name)}).first
    assert len(first.row_steps[0].wanted) < first_rows.ROWS
    for step in first_rows.first_rows_steps(first.row_steps[0]):
        assert fill(first.workspace, step) == first_rows.ROWS


@pytest.mark.parametrize(
    ("rows", "least", "ends"),
    [
        ([("ok", "")] * 8, 0.5, False),  # equal rewards prove nothing on few rows
        ([("ok", "")] + [("timeout", "")] * 7, 0.5, False),
        ([("timeout", "6 s")] * 4, 0.5, True),
        ([("timeout", "6 s")] * 8, 0.0, False),
        ([("parse_error", f"no score in {n}") for n in range(8)], 0.5, True),  # a chance of 1 in 256
        ([("parse_error", f"no score in {n}") for n in range(4)], 0.5, False),  # 1 in 16
        ([("parse_error", f"no score in {n}") for n in range(8)], 0.2, False),
    ],
)
def test_only_failures_that_are_no_accident_end_a_run(
    rows: list[tuple[str, str]], least: float, ends: bool
) -> None:
    if ends:
        with pytest.raises(QRPOError, match=f"each of the first {len(rows)} rows"):
            first_rows.refuse_failing(reward_rows(0.0, rows), least)
    else:
        first_rows.refuse_failing(reward_rows(0.0, rows), least)


def test_a_worker_tries_rows_of_its_own_share(settings: dict[str, Any]) -> None:
    first = steps_of(settings).first
    samples = first.row_steps[0]
    missing = missing_ranges(samples.wanted, [])
    second = ShardStep(samples, split(samples, missing, 2)[1])
    drawn, scored = first_rows.first_rows_steps(second)
    assert set(drawn.wanted) <= set(second.wanted)
    assert {key.partition(".")[0] for key in scored.wanted} == set(drawn.wanted)


def test_what_is_not_tried(settings: dict[str, Any]) -> None:
    steps = steps_of(settings, evaluation={"judges": {"brevity": {"kind": "length", "max_words": 2}}})
    samples = steps.first.row_steps[0]
    assert isinstance(samples, SampleStep)
    assert first_rows.first_rows_steps(steps.first.logprobs) == ()
    assert first_rows.first_rows_steps(steps.before.judges["brevity"]) == ()  # training never sees it
    for changes in (
        {"store": settings["store"] | {"rows_per_block": first_rows.FEWEST - 1}},
        {"reward": {"kind": "model", "model": {"path": "classifier"}}}
        | {"sampling": settings["sampling"] | {"engine": "vllm"}},
    ):
        assert first_rows.first_rows_steps(samples)
        other = Workspace(changed({**settings, **changes}))
        assert first_rows.first_rows_steps(replace(samples, workspace=other)) == ()
