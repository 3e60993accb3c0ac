"""What stops a training for want of a signal, and the headlines that say what nearly did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.experiments import parse_experiment
from qrpo_core.records import REWARDS
from qrpo_core.steps import signal
from qrpo_core.steps.headlines import Finished, headlines

Rows = list[tuple[str, str]]


def rewards(rows: Rows) -> pa.Table:
    """rows : (status, detail) each."""
    return pa.Table.from_pylist(
        [
            {"prompt_id": "a", "sample_index": at, "reference_digest": "", "status": status, "detail": detail}
            | {"reward": 1.0 if status == "ok" else None}
            for at, (status, detail) in enumerate(rows)
        ],
        schema=REWARDS,
    )


def asked(**sections: Any) -> Any:
    base: dict[str, Any] = {
        "model": {"path": "model"},
        "prompts": {"kind": "file", "path": "a.jsonl"},
        "reward": {"kind": "length", "max_words": 3},
    }
    return parse_experiment(base | sections)


def facts(rows: Rows, **others: Any) -> dict[str, Any]:
    plain = {"prompts": 3, "rows": 9, "pairs": 3, "prompts_with_signal": 3, "reward_range": [0.0, 1.0]}
    return plain | {"statuses": signal.status_facts(rewards(rows)), "preference": "reward"} | others


@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "timeout", "parse_error"]), st.sampled_from(["", "x", "y"])),
        max_size=20,
    )
)
def test_every_row_is_counted_once(rows: Rows) -> None:
    found = signal.status_facts(rewards(rows))
    assert sum(each["count"] for each in found.values()) == len(rows)
    for status, each in found.items():
        details = [detail for name, detail in rows if name == status]
        assert each["count"] == len(details)
        assert each["times"] == details.count(each["detail"]) == max(map(details.count, details))
    ok = sum(status == "ok" for status, _ in rows)
    assert signal.scored_share(found) == (ok / len(rows) if rows else 1.0)


def test_rows_without_a_reward_are_named_by_status_and_commonest_detail() -> None:
    rows = (
        [("ok", "")] * 2
        + [("timeout", "")]
        + [("endpoint_error", "HTTP 401")] * 3
        + [("endpoint_error", "x")]
    )
    assert signal.unscored(signal.status_facts(rewards(rows))) == (
        "endpoint_error 4 (3 times: HTTP 401), timeout 1"
    )


@pytest.mark.parametrize(("least", "stops"), [(0.5, True), (0.25, False), (0.0, False)])
def test_too_few_rows_with_a_reward_stop(least: float, stops: bool) -> None:
    experiment = asked(training_data={"min_scored": least})
    found = facts([("ok", "")] * 2 + [("endpoint_error", "HTTP 401: wrong key")] * 4)
    problem = signal.nothing_to_learn(experiment, found)
    assert (problem is not None) == stops
    if stops:
        text = str(problem)
        assert "2 of 6 training completions have a reward (33.3%)" in text
        assert "endpoint_error 4 (HTTP 401: wrong key)" in text
        assert (
            ": run again (rows with endpoint_error are asked for again, up to store.tries times), mend"
            in text
        )
        assert "\n" not in text


def test_references_count_as_completions_do() -> None:
    found = facts([("ok", "")], reference_statuses=signal.status_facts(rewards([("too_long", "9 > 8")] * 3)))
    text = str(signal.nothing_to_learn(asked(), found))
    assert "0 of 3 references have a reward (0.0%)" in text
    assert ": mend the reward, or lower" in text  # too_long does not pass: another run would not ask again


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
    assert signal.contradicted_share(found) == share
    problem = signal.nothing_to_learn(asked(), found)
    assert (problem is not None) == (share is not None and share > 0.5)


def finished(
    found: dict[str, Any],
    *,
    kind: str = "qrpo",
    truncated: int = 0,
    cut: float = 0.0,
    share: float | None = 1.0,
) -> Finished:
    """What a run of one round made, as far as headlines look at it."""
    made = SimpleNamespace(
        quantiles=SimpleNamespace(facts=found | {"cut": {"completions": {"cut": truncated, "of": 9}}}),
        train=SimpleNamespace(
            facts={"rows": 3, "diagnostics": {"objective": kind}, "saved": {"share": share}}
        ),
    )
    evaluation = SimpleNamespace(after=SimpleNamespace(truncation_rate=cut))
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
        "Every held-out completion of the trained policy was cut",
        "DPO was trained on 3 pairs, preferred by their rewards.",
    ):
        assert part in shown
