"""Rows that cannot be used are told together, or left out."""

from __future__ import annotations

import pickle

import pytest

from qrpo_core.data.unusable import PLACES, SHOWN, Unusable, UnusableError, count_kinds, report_unusable

LONG = Unusable("a" * 32, "p.jsonl:3", "900 tokens,\nmore than 512", "shorten it", "too long for the model")
NULL = Unusable("b" * 32, "p.jsonl:9", "the ground truth is null", "fill it in", "without a ground truth")
ANSWER = Unusable("c" * 32, "p.jsonl:12, 'chosen'", "too long", "shorten it", "too long for the model", 7)


def test_one_error_tells_all_of_them_with_place_and_remedy() -> None:
    with pytest.raises(UnusableError) as caught:
        report_unusable([LONG, NULL, ANSWER], "refuse")
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("3 rows cannot be used (2 too long for the model, 1 without a ground truth): ")
    assert "prompts.on_unusable: skip" in head
    assert lines == [
        "  p.jsonl:3: 900 tokens, more than 512; shorten it",
        "  p.jsonl:9: the ground truth is null; fill it in",
        "  p.jsonl:12, 'chosen': too long; shorten it",
    ]


def test_the_error_crosses_processes_with_its_lines() -> None:
    with pytest.raises(UnusableError) as caught:
        report_unusable([LONG, NULL], "refuse")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copy, UnusableError)
    assert str(copy) == str(caught.value)


def test_many_are_told_by_their_place() -> None:
    found = [
        Unusable(f"{n:032d}", f"p.jsonl:{n}", "no ground truth", "fill it in")
        for n in range(SHOWN + PLACES + 5)
    ]
    with pytest.raises(UnusableError) as caught:
        report_unusable(found, "refuse")
    lines = str(caught.value).splitlines()
    assert len(lines) == SHOWN + 2
    assert f"p.jsonl:{SHOWN}, " in lines[-1]
    assert lines[-1].endswith("and 5 more")


def test_skip_leaves_out_prompts_and_no_prompt_for_one_of_its_completions() -> None:
    unread = Unusable(None, "p.jsonl:4", "not JSON", "mend it")
    assert report_unusable([LONG, NULL, ANSWER, unread], "skip") == {"a" * 32, "b" * 32}
    assert report_unusable([], "refuse") == set()


def test_two_problems_of_one_row_are_one_row() -> None:
    both = [
        LONG,
        Unusable(LONG.prompt_id, LONG.where, "no ground truth", "fill it in", "without a ground truth"),
    ]
    with pytest.raises(UnusableError, match=r"^1 row cannot be used"):
        report_unusable(both, "refuse")
    assert count_kinds(both) == {"too long for the model": 1, "without a ground truth": 1}
