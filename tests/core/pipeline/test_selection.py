"""Which completions each mode trains on, what they are paired with and ranked among; by brute force."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import OFFLINE
from qrpo_core.config.training import TrainingDataConfig
from qrpo_core.pipeline.rank_counts import rank
from qrpo_core.pipeline.selection import Selection, expected_rows, select

Scores = dict[str, dict[int, float | None]]

#: Rewards with many ties and some rows without one.
SCORES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.dictionaries(st.integers(0, 7), st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0])), max_size=8),
    max_size=4,
)


def rewards(scores: Scores) -> pa.Table:
    rows = [(prompt, index, value) for prompt, found in scores.items() for index, value in found.items()]
    return pa.table(
        {
            "prompt_id": pa.array([row[0] for row in rows], pa.string()),
            "sample_index": pa.array([row[1] for row in rows], pa.int32()),
            "ground_truth_digest": pa.array([""] * len(rows), pa.string()),
            "reward": pa.array([row[2] for row in rows], pa.float64()),
            "status": pa.array(["parse_error" if row[2] is None else "ok" for row in rows], pa.string()),
            "detail": pa.array([""] * len(rows), pa.string()),
        }
    )


def scored(scores: Scores) -> dict[str, dict[int, float]]:
    found = {
        prompt: {index: value for index, value in values.items() if value is not None}
        for prompt, values in scores.items()
    }
    return {prompt: values for prompt, values in found.items() if values}


def by_prompt(table: pa.Table) -> dict[str, set[int]]:
    found: dict[str, set[int]] = defaultdict(set)
    for row in table.to_pylist():
        assert row["sample_index"] not in found[row["prompt_id"]]
        found[row["prompt_id"]].add(row["sample_index"])
    return dict(found)


def pairs_of(chosen: Selection) -> list[tuple[str, int, int]]:
    return [tuple(row.values()) for row in chosen.pairs.to_pylist()]


def mode(name: str, **settings: Any) -> TrainingDataConfig:
    return TrainingDataConfig(mode=name, **settings)  # type: ignore[arg-type]


@given(SCORES, st.one_of(st.none(), st.integers(1, 8)))
def test_random_takes_the_first_and_ranks_among_all(scores: Scores, count: int | None) -> None:
    table = rewards(scores)
    chosen = select(mode("random", count=count), table, table)
    limit = 8 if count is None else count
    expected = {prompt: {i for i in found if i < limit} for prompt, found in scored(scores).items()}
    assert by_prompt(chosen.rows) == {prompt: rows for prompt, rows in expected.items() if rows}
    assert chosen.references is not None
    assert by_prompt(chosen.references) == {prompt: set(rows) for prompt, rows in scored(scores).items()}
    assert chosen.in_pool
    assert len(chosen.pairs) == 0


@given(SCORES, st.one_of(st.none(), st.integers(1, 4)))
def test_pairs_are_neighbours_with_the_better_chosen(scores: Scores, count: int | None) -> None:
    table = rewards(scores)
    chosen = select(mode("pairs", count=count), table, table)
    pairs, tied, rows = set(), 0, defaultdict(set)
    for prompt, found in scored(scores).items():
        for left in range(0, 8 if count is None else 2 * count, 2):
            if left in found and left + 1 in found:
                rows[prompt] |= {left, left + 1}
                if found[left] == found[left + 1]:
                    tied += 1
                else:
                    better = max((left, left + 1), key=found.__getitem__)
                    pairs.add((prompt, better, 2 * left + 1 - better))
    assert by_prompt(chosen.rows) == dict(rows)
    assert set(pairs_of(chosen)) == pairs
    assert chosen.facts["tied_pairs"] == tied
    assert chosen.in_pool


@given(SCORES, st.integers(2, 6))
def test_best_and_worst_of_the_pool_are_ranked_among_others(scores: Scores, pool: int) -> None:
    table = rewards(scores)
    chosen = select(mode("best_worst", pool=pool), table, table)
    inside = {p: {i: r for i, r in found.items() if i < pool} for p, found in scored(scores).items()}
    inside = {prompt: found for prompt, found in inside.items() if len(found) > 1}
    picked = by_prompt(chosen.rows)
    assert picked.keys() == inside.keys()
    for prompt, rows in picked.items():
        values = sorted(inside[prompt][index] for index in rows)
        assert values == [min(inside[prompt].values()), max(inside[prompt].values())]
    assert chosen.references is not None
    assert all(index >= pool for index in chosen.references["sample_index"].to_pylist())
    assert not chosen.in_pool
    assert chosen.facts["tied_pairs"] + len(chosen.pairs) == len(inside)
    for prompt, best, worst in pairs_of(chosen):
        assert inside[prompt][best] > inside[prompt][worst]


def test_selected_by_rank_among_others_is_unbiased_and_among_its_own_pool_is_not() -> None:
    # The better of two independent uniform draws has the mean quantile 2/3 (method, section 3.2).
    random = np.random.default_rng(0)
    scores: Scores = {str(p): dict(enumerate(random.random(12).tolist())) for p in range(2000)}
    table = rewards(scores)
    chosen = select(mode("best_worst", pool=2), table, table)
    counts, *_ = rank(chosen)
    quantile = (counts["below"].to_numpy() + counts["equal"].to_numpy()) / counts["n"].to_numpy()
    assert quantile[0::2].mean() == pytest.approx(2 / 3, abs=0.015)
    assert quantile[1::2].mean() == pytest.approx(1 / 3, abs=0.015)
    inside = Selection(
        chosen.rows, chosen.pairs, table.filter(pa.compute.less(table["sample_index"], 2)), True
    )
    counts, *_ = rank(inside)
    assert set(counts["below"].to_numpy()[0::2].tolist()) == {1}  # always "better than every reference"


@given(SCORES, st.sampled_from(["random", "pairs", "best_worst"]))
def test_another_policys_draws_are_ranked_among_all_references(scores: Scores, name: str) -> None:
    table, others = rewards(scores), rewards(scores)
    chosen = select(mode(name, **({"pool": 2} if name == "best_worst" else {})), table, others)
    assert chosen.references is not None
    assert by_prompt(chosen.references) == {prompt: set(rows) for prompt, rows in scored(scores).items()}
    assert not chosen.in_pool


@given(SCORES)
def test_rank_counts_and_what_is_left_out(scores: Scores) -> None:
    table = rewards(scores)
    chosen = select(mode("random"), table, table)
    kept = {prompt: found for prompt, found in scored(scores).items() if len(found) >= 2}
    if not kept:
        with pytest.raises(ObjectiveError, match="references_per_prompt to 2 or more"):
            rank(chosen)
        return
    counts, references, _, facts = rank(chosen)
    assert facts["prompts"] == len(kept)
    assert facts["rows"] == sum(map(len, kept.values()))
    assert {r["prompt_id"]: r["rewards"] for r in references.to_pylist()} == {
        prompt: sorted(found.values()) for prompt, found in kept.items()
    }
    for row in counts.to_pylist():
        others = [v for i, v in kept[row["prompt_id"]].items() if i != row["sample_index"]]
        assert row["reward"] == kept[row["prompt_id"]][row["sample_index"]]
        assert row["below"] == sum(other < row["reward"] for other in others)
        assert row["equal"] == sum(other == row["reward"] for other in others)
        assert row["n"] == len(others)


def offline(rows: list[dict[str, Any]]) -> pa.Table:
    empty = {"text": "", "label": "", "pair": None, "reward": None, "source": ""}
    return pa.Table.from_pylist([empty | row for row in rows], schema=OFFLINE)


@pytest.mark.parametrize(
    ("preference", "pairs", "rows", "facts"),
    [
        (
            "reward",
            [("a", 1, 2), ("a", 4, 3)],
            7,
            {"label_contradicts_reward": 1, "pairs_with_an_unscored_side": 1, "tied_pairs": 1},
        ),
        ("label", [("a", 1, 2), ("a", 3, 4), ("b", 5, 6), ("b", 7, 8)], 8, {}),
    ],
)
def test_offline_pairs_by_reward_or_by_label(
    preference: str, pairs: list[tuple[str, int, int]], rows: int, facts: dict[str, int]
) -> None:
    sides = [("a", 0, 1, 2), ("a", 1, 3, 4), ("b", 0, 5, 6), ("b", 1, 7, 8)]
    labels = [
        {"prompt_id": prompt, "pair": number, "label": label, "sample_index": index}
        for prompt, number, chosen, rejected in sides
        for label, index in (("chosen", chosen), ("rejected", rejected))
    ]
    # Pair 1 of a contradicts its label, pair 0 of b ties, one side of the last has no reward.
    table = rewards({"a": {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, "b": {5: 0.5, 6: 0.5, 7: 1.0, 8: None}})
    chosen = select(mode("offline", preference=preference), table, None, offline=offline(labels))
    assert pairs_of(chosen) == pairs
    assert chosen.facts == {"labelled_pairs": 4, **facts}
    assert len(chosen.rows) == rows
    counts, references, *_ = rank(chosen)  # without references nothing is ranked
    assert set(counts["n"].to_pylist()) == {0}
    assert len(references) == 0


def test_graded_completions_pair_their_best_with_their_worst() -> None:
    table = rewards({"a": {5: 0.0, 6: 1.0, 7: 0.5}, "b": {1: 1.0, 2: 1.0}})
    rows = [{"prompt_id": "a", "sample_index": index} for index in (5, 6, 7)]
    chosen = select(mode("offline"), table, table, offline=offline(rows))
    assert pairs_of(chosen) == [("a", 6, 5)]
    assert chosen.facts == {"tied_pairs": 1}
    assert by_prompt(chosen.rows) == {"a": {5, 6, 7}, "b": {1, 2}}
    assert chosen.in_pool  # each other's references, itself left out


@given(SCORES.filter(bool), st.sampled_from(["random", "pairs"]), st.one_of(st.none(), st.integers(1, 4)))
def test_a_plan_expects_the_rows_that_are_chosen(scores: Scores, name: str, count: int | None) -> None:
    data = mode(name, count=count)
    full: Scores = {prompt: dict.fromkeys(range(8), 0.5) for prompt in scores}
    table = rewards(full)
    picked = by_prompt(select(data, table, table).rows)
    assert picked == {prompt: set(expected_rows(data, 8)) for prompt in full}
