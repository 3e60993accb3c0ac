"""Completions that the length limit cut: kept, left out of training, or counted as wrong; in every mode."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError, ObjectiveError
from qrpo_core.common.schemas import PAIRS, RANK_COUNTS, REFERENCE_REWARDS
from qrpo_core.config.training import TrainingDataConfig
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.plan_text import plan_lines
from qrpo_core.pipeline import training
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.rounds import Round, RoundArtifacts
from qrpo_core.pipeline.run_headlines import Finished, cut, length
from qrpo_core.pipeline.run_report import filtered
from qrpo_core.pipeline.selection import select
from qrpo_core.pipeline.training_targets import derive
from tests.core.small_experiment import changed, fill, precompute, prepare

#: The fake engine ends a completion with probability 1/16 a token: at 12 tokens about half are cut.
SAMPLES = {"references_per_prompt": 8, "max_new_tokens": 12}
MODES: dict[str, dict[str, Any]] = {
    "random": {"mode": "random"},
    "the first three": {"mode": "random", "count": 3},
    "pairs": {"mode": "pairs"},
    "best_worst": {"mode": "best_worst", "pool": 4},
}
WRONG = {"truncated": "wrong", "truncated_reward": -1.0}

Key = tuple[str, int]


@pytest.fixture
def half(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "sampling": settings["sampling"] | SAMPLES}


def drawn(round_: Round) -> tuple[dict[Key, bool], dict[Key, float]]:
    """Whether each drawn completion is cut, and its reward; by (prompt_id, sample_index)."""
    rewards = round_.rewards.read().to_pylist()
    keys = [(row["prompt_id"], row["sample_index"]) for row in rewards]
    ends = round_.rewards.completions.read(keys)["finish_reason"].to_pylist()
    return (
        dict(zip(keys, (end == "length" for end in ends), strict=True)),
        {key: row["reward"] for key, row in zip(keys, rewards, strict=True)},
    )


def counts(round_: Round) -> dict[Key, dict[str, Any]]:
    made = round_.workspace.artifacts.get(round_.quantiles_recipe)
    rows = round_.workspace.load(made, "rank_counts.parquet", RANK_COUNTS).to_pylist()
    return {(row["prompt_id"], row["sample_index"]): row for row in rows}


def references(round_: Round) -> dict[str, list[float]]:
    made = round_.workspace.artifacts.get(round_.quantiles_recipe)
    rows = round_.workspace.load(made, "reference_rewards.parquet", REFERENCE_REWARDS).to_pylist()
    return {row["prompt_id"]: row["rewards"] for row in rows}


def with_data(half: dict[str, Any], mode: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    return {**half, "training_data": mode | how}


def facts(steps: ExperimentSteps) -> dict[str, Any]:
    return steps.workspace.artifacts.get(steps.first.quantiles_recipe).facts


@pytest.mark.parametrize("mode", list(MODES))
def test_kept_by_default_and_counted(half: dict[str, Any], mode: str) -> None:
    steps, _ = precompute(changed(with_data(half, MODES[mode], {})))
    ended, _ = drawn(steps.first)
    assert 0 < sum(ended.values()) < len(ended)
    assert facts(steps)["cut"] == {"completions": {"cut": sum(ended.values()), "of": len(ended)}}
    assert any(ended[key] for key in counts(steps.first))


@pytest.mark.parametrize("mode", list(MODES))
def test_left_out_of_training_and_not_of_the_references(half: dict[str, Any], mode: str) -> None:
    kept, _ = precompute(changed(with_data(half, MODES[mode], {})))
    steps, computed = precompute(changed(with_data(half, MODES[mode], {"truncated": "leave_out"})))
    assert computed["sample references"] == computed["annotate references"] == 0
    ended, _ = drawn(steps.first)
    before, after = counts(kept.first), counts(steps.first)
    assert after
    assert not any(ended[key] for key in after)
    if mode != "best_worst":  # which picks others among those that are left
        whole = {key for key in before if not ended[key]}
        partners = {(prompt, index ^ 1) for prompt, index in whole}
        assert set(after) == (whole & partners if mode == "pairs" else whole)
        assert all(after[key] == before[key] for key in after), "ranks are among all references, as before"
    among = references(kept.first)
    assert all(among[prompt] == rewards for prompt, rewards in references(steps.first).items())
    made = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    data = derive(steps.workspace, made)
    assert len(data.table) == len(after)
    # The check runs over the references: over those that are left it would be no mean under the policy.
    whole_data = derive(kept.workspace, kept.workspace.artifacts.get(kept.first.training_set_recipe))
    if mode == "random":
        mean = data.diagnostics["normalisation_mean"]
        assert mean == pytest.approx(whole_data.diagnostics["normalisation_mean"], rel=1e-9)


@pytest.mark.parametrize("mode", list(MODES))
def test_counted_as_wrong_among_the_references_too(half: dict[str, Any], mode: str) -> None:
    steps, computed = precompute(changed(with_data(half, MODES[mode], WRONG)))
    _, computed = precompute(changed(with_data(half, MODES[mode], {})))
    assert computed["sample references"] == computed["annotate references"] == 0
    ended, rewards = drawn(steps.first)
    pool = 4 if mode == "best_worst" else 0
    for (prompt, index), row in counts(steps.first).items():
        mine = -1.0 if ended[prompt, index] else rewards[prompt, index]
        others = [
            -1.0 if ended[key] else rewards[key]
            for key in ended
            if key[0] == prompt and key[1] >= pool and key != (prompt, index)
        ]
        assert row["reward"] == mine
        assert row["below"] == sum(other < mine for other in others)
        assert row["equal"] == sum(other == mine for other in others)
        assert row["n"] == len(others)
    if mode in ("pairs", "best_worst"):
        made = steps.workspace.artifacts.get(steps.first.quantiles_recipe)
        pairs = steps.workspace.load(made, "pairs.parquet", PAIRS).to_pylist()
        assert pairs
        assert not any(ended[row["prompt_id"], row["chosen"]] for row in pairs)


def test_a_row_without_a_score_counts_as_wrong_once_it_is_cut(
    half: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is wrong for being cut, whatever its scorer says or does not say."""
    (tmp_path / "some_scored.py").write_text(
        "def score(rows):\n    return [None if len(row.completion) % 2 else 1.0 for row in rows]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half = {**half, "reward": {"kind": "python", "python": {"function": "some_scored:score"}}}
    steps, _ = precompute(changed(with_data(half, {"mode": "random"}, WRONG)))
    ended, rewards = drawn(steps.first)
    assert any(ended[key] and rewards[key] is None for key in ended)
    expected = {key: -1.0 if ended[key] else rewards[key] for key in ended}
    found = {key: row["reward"] for key, row in counts(steps.first).items()}
    assert found == {key: reward for key, reward in expected.items() if reward is not None}


def test_offline_answers_are_whole_and_their_references_may_be_cut(
    half: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": "w " * (n % 3), "bad": "w w w w"} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    half = {**half, "prompts": half["prompts"] | fields}
    plain, _ = precompute(changed(with_data(half, {"mode": "offline"}, {})))
    out, _ = precompute(changed(with_data(half, {"mode": "offline"}, {"truncated": "leave_out"})))
    wrong, _ = precompute(changed(with_data(half, {"mode": "offline"}, WRONG)))
    assert counts(out.first) == counts(plain.first)
    found = facts(wrong)["cut"]
    assert found["training completions"]["cut"] == 0
    assert 0 < found["references"]["cut"] < found["references"]["of"]
    for key, row in counts(wrong.first).items():
        assert row["reward"] == counts(plain.first)[key]["reward"]
        assert row["below"] >= counts(plain.first)[key]["below"]
    lowest = sum(rewards.count(-1.0) for rewards in references(wrong.first).values())
    assert lowest == found["references"]["cut"]


@pytest.mark.parametrize("how", [{"truncated": "leave_out"}, WRONG])
def test_later_rounds_do_the_same(half: dict[str, Any], how: dict[str, Any]) -> None:
    rounds = {"count": 2, "samples_per_prompt": 6}
    steps, _ = precompute(changed(with_data(half, {"mode": "random"}, how), rounds=rounds))
    workspace = steps.workspace
    training.build(
        workspace,
        steps.first.train_recipe,
        workspace.artifacts.get(steps.first.training_set_recipe),
        steps.first.start,
    )
    second = steps.round(2)
    prepare(workspace, second)
    ended, _ = drawn(second)
    rows = counts(second)
    assert 0 < sum(ended.values()) < len(ended)
    if how == WRONG:
        assert {key for key, row in rows.items() if row["reward"] == -1.0} == {k for k in ended if ended[k]}
    else:
        assert not any(ended[key] for key in rows)


def test_everything_cut_and_left_out_is_one_line_before_training(half: dict[str, Any]) -> None:
    short = with_data(half, {"mode": "random"}, {"truncated": "leave_out"})
    with pytest.raises(
        ObjectiveError, match=r"all \d+ training completions are cut .*sampling\.max_new_tokens"
    ):
        precompute(changed(short, sampling={"engine": "transformers", "max_new_tokens": 1}))


def test_a_wrong_reward_above_a_whole_completions_is_refused(half: dict[str, Any]) -> None:
    data = {"truncated": "wrong", "truncated_reward": 0.9}
    with pytest.raises(ObjectiveError, match=r"truncated_reward 0\.9 is above 0, .*to 0 or less"):
        precompute(changed(with_data(half, {"mode": "random"}, data)))


def test_what_wrong_is_must_be_known(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"kind 'length' has no known reward of a wrong answer; set"):
        changed(settings, training_data={"truncated": "wrong"})
    for kind in ("number", "exact", "math"):
        asked = changed({**settings, "reward": {"kind": kind}}, training_data={"truncated": "wrong"})
        assert asked.truncated_reward == 0
    assert changed(settings).truncated_reward is None
    with pytest.raises(ConfigError, match=r"needs training_data\.truncated 'wrong'"):
        changed(settings, training_data={"truncated_reward": 0})


def test_plan_table_headline_and_log_say_how_many_and_what_becomes_of_them(
    half: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    experiment = changed(with_data(half, {"mode": "random"}, {"truncated": "leave_out"}))
    with caplog.at_level(logging.WARNING, "qrpo"):
        steps, _ = precompute(experiment)
    workspace = steps.workspace
    ended, _ = drawn(steps.first)
    some = f"{sum(ended.values())} of {len(ended)}"
    assert f"{some} completions are cut by the length limit, and left out of training" in caplog.text
    fill(workspace, steps.before.samples)  # of the same recipe, and counted by itself
    shown = "\n".join(plan_lines(plan(workspace), "store"))
    assert f"{some} are cut by the length limit, and left out of training" in shown
    made = workspace.artifacts.get
    trained = training.build(
        workspace, steps.first.train_recipe, made(steps.first.training_set_recipe), steps.first.start
    )
    round_ = RoundArtifacts(
        made(steps.first.quantiles_recipe), made(steps.first.training_set_recipe), trained
    )
    rows = {row["what"]: row for row in filtered(experiment, made(steps.prompts_recipe), [round_])}
    assert rows["completions cut by the length limit"]["count"] == sum(ended.values())
    assert "stay among the references" in rows["completions cut by the length limit"]["why"]

    def lines(asked: Any) -> list[str]:
        side = SimpleNamespace(truncation_rate=0.0)
        evaluation = SimpleNamespace(before=side, after=side)
        found = Finished(asked, made(steps.prompts_recipe), [round_], evaluation)  # type: ignore[arg-type]
        return [str(line) for line in cut(found)]

    (line,) = lines(experiment)
    assert line.startswith(f"Warning: {some} completions are cut by the length limit")
    assert "raise sampling.max_new_tokens" in line
    assert not lines(changed(half, training_data={"truncated_warning": 1.0}))


@pytest.mark.parametrize(
    ("data", "rates", "remedy"),
    [
        ({}, (0.127, 0.951), "Set training_data.truncated 'wrong', or raise sampling.max_new_tokens."),
        (WRONG, (0.127, 0.951), "Lower training.learning_rate, or raise objective.beta or sampling"),
        ({}, (0.951, 0.951), "Raise sampling.max_new_tokens."),
        ({"truncated_warning": 1.0}, (0.5, 1.0), "Set training_data.truncated 'wrong'"),
    ],
)
def test_a_trained_policy_that_does_not_end_its_answers_is_a_headline(
    half: dict[str, Any], data: dict[str, Any], rates: tuple[float, float], remedy: str
) -> None:
    asked = changed(half, training_data=data)
    (line,) = cut(finished(asked, rates, (1.0, 1.0)))
    after = {0.951: "95.1 %", 1.0: "100.0 %"}[rates[1]]
    assert str(line).startswith(f"Warning: The length limit cuts {after} of the trained policy's held-out")
    assert remedy in line.text
    below = (rates[0], asked.training_data.truncated_warning - 0.01)
    assert not list(cut(finished(asked, below, (1.0, 1.0))))


@pytest.mark.parametrize(("lengths", "told"), [((25.3, 47.4), 1), ((47.4, 25.3), 1), ((20.0, 30.0), 0)])
def test_a_change_of_length_stands_beside_the_gain(
    half: dict[str, Any], lengths: tuple[float, float], told: int
) -> None:
    lines = [str(line) for line in length(finished(changed(half), (0.0, 0.0), lengths))]
    assert len(lines) == told
    assert all(f"{lengths[1]} tokens on average, {lengths[0]} before" in line for line in lines)


def finished(asked: Any, rates: tuple[float, float], lengths: tuple[float, float]) -> Finished:
    """A run without rounds whose evaluation has these shares of cut completions and mean lengths."""
    sides = (
        SimpleNamespace(truncation_rate=rate, mean_length=tokens)
        for rate, tokens in zip(rates, lengths, strict=True)
    )
    evaluation = SimpleNamespace(**dict(zip(("before", "after"), sides, strict=True)))
    return Finished(asked, None, [], evaluation)  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 7), st.sampled_from([0.0, 0.5]), st.booleans())
    ),
    st.sampled_from(["random", "pairs", "best_worst"]),
)
def test_leaving_out_is_training_on_the_same_rows_without_the_cut_ones(
    rows: list[tuple[str, int, float, bool]], mode: str
) -> None:
    unique = list({row[:2]: row for row in rows}.values())
    table = pa.table(
        {
            "prompt_id": pa.array([row[0] for row in unique], pa.string()),
            "sample_index": pa.array([row[1] for row in unique], pa.int32()),
            "ground_truth_digest": pa.array([""] * len(unique), pa.string()),
            "reward": pa.array([row[2] for row in unique], pa.float64()),
            "status": pa.array(["ok"] * len(unique), pa.string()),
            "detail": pa.array([""] * len(unique), pa.string()),
            "cut": pa.array([row[3] for row in unique], pa.bool_()),
        }
    )
    pool = {"pool": 4} if mode == "best_worst" else {}
    plain = TrainingDataConfig(mode=mode, **pool)  # type: ignore[arg-type]
    leaving = TrainingDataConfig(mode=mode, truncated="leave_out", **pool)  # type: ignore[arg-type]
    whole = table.filter(pa.array([not row[3] for row in unique], pa.bool_()))
    chosen, expected = select(leaving, table, table), select(plain, whole, whole)
    assert chosen.rows.to_pylist() == expected.rows.to_pylist()
    assert chosen.pairs.to_pylist() == expected.pairs.to_pylist()
    assert chosen.references is not None
    assert chosen.in_pool == expected.in_pool
    kept = select(plain, table, table).references
    assert kept is not None
    assert chosen.references.to_pylist() == kept.to_pylist()
