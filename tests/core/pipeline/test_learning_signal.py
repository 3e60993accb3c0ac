"""What stops a training for want of a signal, and the headlines that say what nearly did."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.config.reading import parse_experiment
from qrpo_core.evaluation.results import Estimate
from qrpo_core.pipeline import learning_signal
from qrpo_core.pipeline.run_headlines import Finished, headlines
from tests.core.stores import reward_rows

Rows = list[tuple[str, str]]


def rewards(rows: Rows) -> pa.Table:
    """rows : (status, detail) each."""
    return reward_rows(1.0, rows)


def asked(**sections: Any) -> Any:
    base: dict[str, Any] = {
        "model": {"path": "model"},
        "prompts": {"kind": "file", "path": "a.jsonl"},
        "reward": {"kind": "length", "max_words": 3},
    }
    return parse_experiment(base | sections)


def facts(rows: Rows, **others: Any) -> dict[str, Any]:
    plain = {"prompts": 3, "rows": 9, "pairs": 3, "prompts_with_signal": 3, "reward_range": [0.0, 1.0]}
    return plain | {"statuses": learning_signal.status_facts(rewards(rows)), "preference": "reward"} | others


@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "timeout", "parse_error"]), st.sampled_from(["", "x", "y"])),
        max_size=20,
    )
)
def test_every_row_is_counted_once(rows: Rows) -> None:
    found = learning_signal.status_facts(rewards(rows))
    assert sum(each["count"] for each in found.values()) == len(rows)
    for status, each in found.items():
        details = [detail for name, detail in rows if name == status]
        assert each["count"] == len(details)
        assert each["times"] == details.count(each["detail"]) == max(map(details.count, details))
    ok = sum(status == "ok" for status, _ in rows)
    assert learning_signal.scored_share(found) == (ok / len(rows) if rows else 1.0)


def test_rows_without_a_reward_are_named_by_status_and_commonest_detail() -> None:
    rows = (
        [("ok", "")] * 2
        + [("timeout", "")]
        + [("endpoint_error", "HTTP 401")] * 3
        + [("endpoint_error", "x")]
    )
    assert learning_signal.unscored(learning_signal.status_facts(rewards(rows))) == (
        "endpoint_error 4 (3 times: HTTP 401), timeout 1"
    )


@pytest.mark.parametrize(("least", "stops"), [(0.5, True), (0.25, False), (0.0, False)])
def test_too_few_rows_with_a_reward_stop(least: float, stops: bool) -> None:
    experiment = asked(training_data={"min_scored": least})
    found = facts([("ok", "")] * 2 + [("endpoint_error", "HTTP 401: wrong key")] * 4)
    problem = learning_signal.nothing_to_learn(experiment, found)
    assert (problem is not None) == stops
    if stops:
        text = str(problem)
        assert "2 of 6 training completions have a reward (33.3%)" in text
        assert "endpoint_error 4 (HTTP 401: wrong key)" in text
        assert (
            ": run again (rows with endpoint_error are asked for again, up to store.tries times), repair"
            in text
        )
        assert "\n" not in text


def test_references_count_as_completions_do() -> None:
    statuses = learning_signal.status_facts(rewards([("too_long", "9 > 8")] * 3))
    found = facts([("ok", "")], reference_statuses=statuses)
    text = str(learning_signal.nothing_to_learn(asked(), found))
    assert "0 of 3 references have a reward (0.0%)" in text
    assert ": repair the reward, or lower" in text  # too_long does not pass: another run would not ask again


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        # 20 pairs, 9 against their label and 7 ties: of 13 that the reward tells apart, 9 are wrong.
        ((20, 0, 9, 7), 9 / 13),
        ((20, 5, 3, 3), 0.25),
        ((4, 0, 0, 4), None),
        ((4, 4, 0, 0), None),
    ],
)
def test_the_contradicted_share_is_of_pairs_that_the_reward_tells_apart(
    counts: tuple[int, int, int, int], share: float | None
) -> None:
    names = ("labelled_pairs", "pairs_with_an_unscored_side", "label_contradicts_reward", "tied_pairs")
    found = facts([("ok", "")], **dict(zip(names, counts, strict=True)))
    assert learning_signal.contradicted_share(found) == share
    problem = learning_signal.nothing_to_learn(asked(), found)
    assert (problem is not None) == (share is not None and share > 0.5)


def finished(
    found: dict[str, Any],
    *,
    kind: str = "qrpo",
    truncated: int = 0,
    cut: float = 0.0,
    share: float | None = 1.0,
    judges: dict[str, Any] | None = None,
    silent: dict[str, dict[str, int]] | None = None,
) -> Finished:
    """What a run of one round made, as far as headlines look at it."""
    made = SimpleNamespace(
        quantiles=SimpleNamespace(facts=found | {"cut": {"completions": {"cut": truncated, "of": 9}}}),
        train=SimpleNamespace(
            facts={"rows": 3, "diagnostics": {"objective": kind}, "saved": {"share": share}}
        ),
    )
    side = SimpleNamespace(truncation_rate=cut, mean_length=1.0)
    evaluation = SimpleNamespace(
        before=side, after=side, judges=judges or {}, silent_judges=silent or {}, confidence=0.95
    )
    return Finished(asked(), SimpleNamespace(), (made,), evaluation)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "found", "text"),
    [
        ("qrpo", {}, "QRPO was trained on 3 completions."),
        ("dpo", {}, "DPO was trained on 3 pairs."),
        (
            "simpo",
            {"labelled_pairs": 3, "preference": "label"},
            "SimPO was trained on 3 pairs, preferred by the data set's labels.",
        ),
        ("sft", {}, "SFT was trained on 3 completions."),
    ],
)
def test_the_objective_and_its_items_are_named(kind: str, found: dict[str, Any], text: str) -> None:
    assert [str(each) for each in headlines(finished(facts([("ok", "")], **found), kind=kind))] == [text]


def test_a_training_that_moved_nothing_is_a_warning() -> None:
    first, _ = headlines(finished(facts([("ok", "")]), share=None))
    assert str(first).startswith("Warning: Training left the policy as it was: raise training.learning_rate")


@pytest.mark.parametrize(
    ("ends", "severity", "text"),
    [
        ((-0.3, -0.2, -0.1), "warning", "-0.20 [-0.30, -0.10] on 7 held-out prompts (95 % interval)."),
        (
            (-0.1, 0.1, 0.3),
            "note",
            "+0.10 [-0.10, +0.30] on 7 held-out prompts (95 % interval): no change is shown.",
        ),
        ((0.1, 0.2, 0.3), "note", "+0.20 [+0.10, +0.30] on 7 held-out prompts (95 % interval)."),
        ((None, 0.2, None), "note", "+0.200 on 7 held-out prompts (95 % interval)."),
    ],
)
def test_each_held_out_judge_has_a_headline(
    ends: tuple[float | None, float, float | None], severity: str, text: str
) -> None:
    low, value, high = ends
    judge = SimpleNamespace(difference=Estimate(value, low, high), prompts=7)
    lines = headlines(finished(facts([("ok", "")]), judges={"strict": judge}))
    assert str(lines[0]).removeprefix("Warning: ") == f"Judge strict, which training never saw: {text}"
    assert [each.severity for each in lines] == [severity, "note"]


def test_a_judge_without_a_score_is_a_warning_with_its_statuses() -> None:
    statuses = {"parse_error": 4, "timeout": 0, "endpoint_error": 3}
    first, _ = headlines(finished(facts([("ok", "")]), silent={"strict": statuses}))
    assert str(first) == (
        "Warning: Judge strict has no score on both sides of any held-out prompt (after training: "
        "parse_error 4, endpoint_error 3)."
    )


def test_a_judge_that_is_a_part_of_the_reward_is_not_called_unseen() -> None:
    tone, short = {"kind": "sentiment"}, {"kind": "length", "max_words": 8}
    terms = [{"weight": 1.0, "reward": tone}, {"weight": 0.5, "reward": short}]
    judges = {"tone": tone, "shorter": short | {"max_words": 4}}
    experiment = asked(reward={"kind": "weighted", "terms": terms}, evaluation={"judges": judges})
    judge = SimpleNamespace(difference=Estimate(0.2, 0.1, 0.3), prompts=7)
    made = finished(facts([("ok", "")]), judges={"tone": judge, "shorter": judge})
    first, second, _ = (str(each) for each in headlines(replace(made, experiment=experiment)))
    assert first.startswith("Judge tone, a part of the reward: +0.20")
    assert second.startswith("Judge shorter, which training never saw: +0.20")


def test_what_makes_a_result_doubtful_stands_first() -> None:
    found = facts(
        [("ok", "")] * 9 + [("timeout", "6 s")],
        prompts_with_signal=1,
        labelled_pairs=20,
        pairs_with_an_unscored_side=0,
        label_contradicts_reward=9,
        tied_pairs=7,
    )
    lines = headlines(finished(found, kind="dpo", truncated=9, cut=1.0))
    assert [each.severity for each in lines] == ["warning"] * 5 + ["note"]
    shown = "\n".join(map(str, lines))
    for part in (
        "contradict the data set's labels on 9 of 20 pairs (69.2 % of those that they tell apart; 7 tie)",
        "1 of 10 training completions have no reward: timeout 1 (6 s)",
        "On 2 of 3 training prompts all rewards are equal",
        "All 9 completions are cut by the length limit, and kept in training; raise sampling.max_new_tokens",
        "The length limit cuts 100.0 % of the trained policy's held-out completions",
        "DPO was trained on 3 pairs, preferred by their rewards.",
    ):
        assert part in shown
