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

from qrpo_core.errors import ConfigError, ObjectiveError
from qrpo_core.plan import plan
from qrpo_core.records import PAIRS, RANK_COUNTS, REFERENCE_REWARDS
from qrpo_core.show import plan_lines
from qrpo_core.steps import training
from qrpo_core.steps.chain import Chain
from qrpo_core.steps.evaluation import filtered
from qrpo_core.steps.headlines import Finished, cut
from qrpo_core.steps.rounds import Made, Round
from qrpo_core.steps.selection import select
from qrpo_core.steps.tables import load
from qrpo_core.steps.targets import derive
from qrpo_core.train.config import TrainingDataConfig

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
    made = round_.workspace.artifacts.get(round_.quantiles)
    rows = load(round_.workspace, made, "rank_counts.parquet", RANK_COUNTS).to_pylist()
    return {(row["prompt_id"], row["sample_index"]): row for row in rows}


def references(round_: Round) -> dict[str, list[float]]:
    made = round_.workspace.artifacts.get(round_.quantiles)
    rows = load(round_.workspace, made, "reference_rewards.parquet", REFERENCE_REWARDS).to_pylist()
    return {row["prompt_id"]: row["rewards"] for row in rows}


def with_data(half: dict[str, Any], mode: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    return {**half, "training_data": mode | how}


def facts(chain: Chain) -> dict[str, Any]:
    return chain.workspace.artifacts.get(chain.first.quantiles).facts


@pytest.mark.parametrize("mode", list(MODES))
def test_kept_by_default_and_counted(steps: Any, half: dict[str, Any], mode: str) -> None:
    chain, _ = steps.precompute(steps.changed(with_data(half, MODES[mode], {})))
    ended, _ = drawn(chain.first)
    assert 0 < sum(ended.values()) < len(ended)
    assert facts(chain)["cut"] == {"completions": {"cut": sum(ended.values()), "of": len(ended)}}
    assert any(ended[key] for key in counts(chain.first))


@pytest.mark.parametrize("mode", list(MODES))
def test_left_out_of_training_and_not_of_the_references(steps: Any, half: dict[str, Any], mode: str) -> None:
    kept, _ = steps.precompute(steps.changed(with_data(half, MODES[mode], {})))
    chain, computed = steps.precompute(
        steps.changed(with_data(half, MODES[mode], {"truncated": "leave_out"}))
    )
    assert computed["sample references"] == computed["score references"] == 0
    ended, _ = drawn(chain.first)
    before, after = counts(kept.first), counts(chain.first)
    assert after
    assert not any(ended[key] for key in after)
    if mode != "best_worst":  # which picks others among those that are left
        whole = {key for key in before if not ended[key]}
        partners = {(prompt, index ^ 1) for prompt, index in whole}
        assert set(after) == (whole & partners if mode == "pairs" else whole)
        assert all(after[key] == before[key] for key in after), "ranks are among all references, as before"
    among = references(kept.first)
    assert all(among[prompt] == rewards for prompt, rewards in references(chain.first).items())
    made = chain.workspace.artifacts.get(chain.first.training_set)
    data = derive(chain.workspace, made)
    assert len(data.table) == len(after)
    # The check runs over the references: over those that are left it would be no mean under the policy.
    whole_data = derive(kept.workspace, kept.workspace.artifacts.get(kept.first.training_set))
    if mode == "random":
        mean = data.diagnostics["normalisation_mean"]
        assert mean == pytest.approx(whole_data.diagnostics["normalisation_mean"], rel=1e-9)


@pytest.mark.parametrize("mode", list(MODES))
def test_counted_as_wrong_among_the_references_too(steps: Any, half: dict[str, Any], mode: str) -> None:
    chain, computed = steps.precompute(steps.changed(with_data(half, MODES[mode], WRONG)))
    _, computed = steps.precompute(steps.changed(with_data(half, MODES[mode], {})))
    assert computed["sample references"] == computed["score references"] == 0
    ended, rewards = drawn(chain.first)
    pool = 4 if mode == "best_worst" else 0
    for (prompt, index), row in counts(chain.first).items():
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
        made = chain.workspace.artifacts.get(chain.first.quantiles)
        pairs = load(chain.workspace, made, "pairs.parquet", PAIRS).to_pylist()
        assert pairs
        assert not any(ended[row["prompt_id"], row["chosen"]] for row in pairs)


def test_a_row_without_a_score_counts_as_wrong_once_it_is_cut(
    steps: Any, half: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is wrong for being cut, whatever its scorer says or does not say."""
    (tmp_path / "some_scored.py").write_text(
        "def score(rows):\n    return [None if len(row.completion) % 2 else 1.0 for row in rows]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    half = {**half, "reward": {"kind": "python", "python": {"function": "some_scored:score"}}}
    chain, _ = steps.precompute(steps.changed(with_data(half, {"mode": "random"}, WRONG)))
    ended, rewards = drawn(chain.first)
    assert any(ended[key] and rewards[key] is None for key in ended)
    expected = {key: -1.0 if ended[key] else rewards[key] for key in ended}
    found = {key: row["reward"] for key, row in counts(chain.first).items()}
    assert found == {key: reward for key, reward in expected.items() if reward is not None}


def test_offline_answers_are_whole_and_their_references_may_be_cut(
    steps: Any, half: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": "w " * (n % 3), "bad": "w w w w"} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    half = {**half, "prompts": half["prompts"] | fields}
    plain, _ = steps.precompute(steps.changed(with_data(half, {"mode": "offline"}, {})))
    out, _ = steps.precompute(steps.changed(with_data(half, {"mode": "offline"}, {"truncated": "leave_out"})))
    wrong, _ = steps.precompute(steps.changed(with_data(half, {"mode": "offline"}, WRONG)))
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
def test_later_rounds_do_the_same(steps: Any, half: dict[str, Any], how: dict[str, Any]) -> None:
    rounds = {"count": 2, "samples_per_prompt": 6}
    chain, _ = steps.precompute(steps.changed(with_data(half, {"mode": "random"}, how), rounds=rounds))
    workspace = chain.workspace
    training.build(
        workspace, chain.first.train, workspace.artifacts.get(chain.first.training_set), chain.first.start
    )
    second = chain.round(2)
    steps.prepare(workspace, second)
    ended, _ = drawn(second)
    rows = counts(second)
    assert 0 < sum(ended.values()) < len(ended)
    if how == WRONG:
        assert {key for key, row in rows.items() if row["reward"] == -1.0} == {k for k in ended if ended[k]}
    else:
        assert not any(ended[key] for key in rows)


def test_everything_cut_and_left_out_is_one_line_before_training(steps: Any, half: dict[str, Any]) -> None:
    short = with_data(half, {"mode": "random"}, {"truncated": "leave_out"})
    with pytest.raises(
        ObjectiveError, match=r"all \d+ training completions are cut .*sampling\.max_new_tokens"
    ):
        steps.precompute(steps.changed(short, sampling={"engine": "transformers", "max_new_tokens": 1}))


def test_a_wrong_reward_above_a_whole_completions_is_refused(steps: Any, half: dict[str, Any]) -> None:
    data = {"truncated": "wrong", "truncated_reward": 0.9}
    with pytest.raises(ObjectiveError, match=r"truncated_reward 0\.9 is above 0, .*to 0 or less"):
        steps.precompute(steps.changed(with_data(half, {"mode": "random"}, data)))


def test_what_wrong_is_must_be_known(steps: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"of kind 'length' it is not known which reward is wrong; set"):
        steps.changed(settings, training_data={"truncated": "wrong"})
    for kind in ("number", "exact", "math"):
        asked = steps.changed({**settings, "reward": {"kind": kind}}, training_data={"truncated": "wrong"})
        assert asked.truncated_reward == 0
    assert steps.changed(settings).truncated_reward is None
    with pytest.raises(ConfigError, match=r"needs training_data\.truncated 'wrong'"):
        steps.changed(settings, training_data={"truncated_reward": 0})


def test_plan_table_headline_and_log_say_how_many_and_what_becomes_of_them(
    steps: Any, half: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    experiment = steps.changed(with_data(half, {"mode": "random"}, {"truncated": "leave_out"}))
    with caplog.at_level(logging.WARNING, "qrpo"):
        chain, _ = steps.precompute(experiment)
    workspace = chain.workspace
    ended, _ = drawn(chain.first)
    some = f"{sum(ended.values())} of {len(ended)}"
    assert f"{some} completions are cut by the length limit, and left out of training" in caplog.text
    steps.fill(workspace, chain.before.samples)  # of the same recipe, and counted by itself
    shown = "\n".join(plan_lines(plan(workspace), "store"))
    assert f"{some} are cut by the length limit, and left out of training" in shown
    made = workspace.artifacts.get
    trained = training.build(workspace, chain.first.train, made(chain.first.training_set), chain.first.start)
    round_ = Made(made(chain.first.quantiles), made(chain.first.training_set), trained)
    rows = {row["what"]: row for row in filtered(experiment, made(chain.prompts), [round_])}
    assert rows["completions cut by the length limit"]["count"] == sum(ended.values())
    assert "stay among the references" in rows["completions cut by the length limit"]["why"]

    def lines(asked: Any) -> list[str]:
        evaluation = SimpleNamespace(after=SimpleNamespace(truncation_rate=0.5))
        found = Finished(asked, made(chain.prompts), [round_], evaluation)  # type: ignore[arg-type]
        return [str(line) for line in cut(found)]

    (line,) = lines(experiment)
    assert line.startswith(f"Warning: {some} completions are cut by the length limit")
    assert "raise sampling.max_new_tokens" in line
    assert not lines(steps.changed(half, training_data={"truncated_warning": 1.0}))


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
            "reference_digest": pa.array([""] * len(unique), pa.string()),
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
