"""A few rows before the bulk: which, what of their rewards ends a run, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.errors import QRPOError
from qrpo_core.records import COMPLETIONS, REWARDS
from qrpo_core.steps import prompts, trial
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.shares import ShareStep, split
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import count_rows, missing_runs

FUNCTIONS = """
def broken(batch):
    raise KeyError("answer_key")

def half(batch):
    return [None if row.sample_index % 2 else 1.0 for row in batch]

def fails_first(batch):
    return [None if row.sample_index == 0 else float(len(row.completion)) for row in batch]
"""


def chain_of(steps: Any, settings: dict[str, Any], **sections: Any) -> Chain:
    settings = {**settings, "store": settings["store"] | {"rows_per_block": 8192}}
    workspace = Workspace(steps.changed(settings, **sections))
    prompts.build(workspace, prompts.recipe(workspace))
    return stored_chain(workspace)


def python(folder: Path, name: str) -> dict[str, Any]:
    """A reward section, whose module is called as its folder is: modules of other tests stay apart."""
    module = f"reward_{name}_{folder.name}".replace("-", "_")
    (folder / f"{module}.py").write_text(FUNCTIONS)
    return {"kind": "python", "python": {"function": f"{module}:{name}"}}


@given(
    st.dictionaries(st.text("abc", min_size=1), st.integers(0, 9).map(range), max_size=12), st.integers(1, 9)
)
def test_the_rows_are_spread_over_prompts(wanted: dict[str, range], rows: int) -> None:
    found = trial._first_rows(wanted, rows)
    first = {key: wanted[key] for key in list(wanted)[:rows]}
    assert count_rows(found) == min(rows, count_rows(first))
    for indices in found.values():
        assert indices == list(range(len(indices)))
    counts = [len(found.get(key, ())) for key in first]
    fullest = max(counts, default=0)
    assert all(count >= min(fullest - 1, len(first[key])) for count, key in zip(counts, first, strict=True))


def test_a_few_samples_and_their_rewards_come_first_and_once(steps: Any, settings: dict[str, Any]) -> None:
    first = chain_of(steps, settings).first
    samples, rewards = first.row_steps
    drawn, scored = trial.trial(samples)
    assert count_rows(drawn.wanted) == count_rows(scored.wanted) == trial.ROWS
    assert steps.fill(first.workspace, drawn) == steps.fill(first.workspace, scored) == trial.ROWS
    assert trial.trial(samples) == trial.trial(rewards) == ()  # rows have been scored
    rest = count_rows(samples.wanted) - trial.ROWS
    assert [steps.fill(first.workspace, step) for step in (samples, rewards)] == [rest, rest]
    for step, schema in ((samples, COMPLETIONS), (rewards, REWARDS)):
        assert missing_runs(step.wanted, first.workspace.blocks.committed(step.recipe)) == []
        first.workspace.blocks.read(step.recipe, step.wanted, schema)


def test_the_few_rows_say_nothing_of_the_rate(steps: Any, settings: dict[str, Any]) -> None:
    first = chain_of(steps, settings).first
    drawn, _ = trial.trial(first.row_steps[0])
    steps.fill(first.workspace, drawn)
    assert first.workspace.blocks.rate(drawn.recipe) is None
    steps.fill(first.workspace, first.row_steps[0])
    assert first.workspace.blocks.rate(drawn.recipe) is not None


def test_a_reward_that_always_raises_ends_the_run_and_keeps_the_samples(
    steps: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    first = chain_of(steps, {**settings, "reward": python(tmp_path, "broken")}).first
    samples, rewards = first.row_steps
    drawn, scored = trial.trial(samples)
    steps.fill(first.workspace, drawn)
    with pytest.raises(
        QRPOError, match=r"fails on each of the first 8 rows: .*KeyError: 'answer_key'"
    ) as found:
        steps.fill(first.workspace, scored)
    assert "\n" not in str(found.value)
    assert first.workspace.blocks.committed(rewards.recipe) == []
    drawn_again, _ = trial.trial(samples)
    assert missing_runs(drawn_again.wanted, first.workspace.blocks.committed(samples.recipe)) == []


@pytest.mark.parametrize("name", ["half", "fails_first"])
def test_a_reward_that_scores_some_goes_on(
    steps: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Even where every prompt's first sample fails: seven prompts give an eighth row that is a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    steps.write_questions(tmp_path / "questions.jsonl", list(range(9)))
    first = chain_of(steps, {**settings, "reward": python(tmp_path, name)}).first
    assert len(first.row_steps[0].wanted) < trial.ROWS
    for step in trial.trial(first.row_steps[0]):
        assert steps.fill(first.workspace, step) == trial.ROWS


def table(rows: list[tuple[str, str]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"prompt_id": "a", "sample_index": at, "reference_digest": "", "status": status, "detail": detail}
            | {"reward": 0.0 if status == "ok" else None}
            for at, (status, detail) in enumerate(rows)
        ],
        schema=REWARDS,
    )


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
            trial.refuse_failing(table(rows), least)
    else:
        trial.refuse_failing(table(rows), least)


def test_a_worker_tries_rows_of_its_own_share(steps: Any, settings: dict[str, Any]) -> None:
    first = chain_of(steps, settings).first
    samples = first.row_steps[0]
    missing = missing_runs(samples.wanted, [])
    second = ShareStep(samples, split(samples, missing, 2)[1])
    drawn, scored = trial.trial(second)
    assert set(drawn.wanted) <= set(second.wanted)
    assert {key.partition(".")[0] for key in scored.wanted} == set(drawn.wanted)


def test_what_is_not_tried(steps: Any, settings: dict[str, Any]) -> None:
    chain = chain_of(steps, settings, evaluation={"judges": {"brevity": {"kind": "length", "max_words": 2}}})
    samples = chain.first.row_steps[0]
    assert isinstance(samples, SampleStep)
    assert trial.trial(chain.first.logprobs) == ()
    assert trial.trial(chain.before.judges["brevity"]) == ()  # training never sees it
    for changes in (
        {"store": settings["store"] | {"rows_per_block": trial.FEWEST - 1}},
        {"reward": {"kind": "model", "model": {"path": "classifier"}}}
        | {"sampling": settings["sampling"] | {"engine": "vllm"}},
    ):
        assert trial.trial(samples)
        other = Workspace(steps.changed({**settings, **changes}))
        assert trial.trial(replace(samples, workspace=other)) == ()
