"""What a judge's answer means: the written score, and the expected one by hand-made tables."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qrpo_core.rewards.judge.answer import expected, written
from qrpo_core.rewards.judge.statements import Unreadable


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        (" 7\n", 7),
        ("Score: 7.", 7),
        ("7/10", 7),
        ("**7** / 10", 7),
        ("I give it 7 out of 10!", 7),
        ("10/10", 10),
        ("[[3]]", 3),
        ("5 ... yes, 5", 5),
        ("07", 7),
        ("I rate GPT4o a 2", 2),
        ("7.0", 7),
        ("from 1 to 10, a 7", 7),
        ("Rate from 1 (useless) to 10 (perfect): 7", 7),
        ("\uff17", 7),
        ("\u0667", 7),
        ("7\n7", 7),
        ('"7"', 7),
        ("#7", 7),
        ("$7$", 7),
        ("7,", 7),
        ("7 /10", 7),
        ("Rating=7", 7),
        ("<think>\nTwo faults, so 6 or 8?\n</think>\n\n7", 7),
        ("two faults, so 6 or 8?\n</think>7", 7),
        ("[THINK]6[/THINK] **7**", 7),
        ("1. Accuracy: good\n2. Style: good\nScore: 7", 7),
        ("Helpfulness 8, honesty 6. Overall: 7", 7),
        ("Score: 8 for style.\nFinal score (1-10): **7** / 10", 7),
        ("It has 3 errors.\n\nFinal rating: 7", 7),
        ('{"faults": 2, "score": 7, "reason": "2 faults"}', 7),
        ("It has 2 faults. <score>7</score>", 7),
        ("2 faults, \\boxed{7}", 7),
        ("2 faults: [[7]]", 7),
        ("3 of 4 claims hold. My rating is 7.", 7),
        ("3 of 4 claims hold. My rating would be 7.", 7),
        ("The maximum score is 10. I give 7", 7),
        ("Rating: 1-10\nScore: 7", 7),
        ("7/10 - good, but 2 faults", 7),
        ("\uff17\uff0f\uff11\uff10", 7),
        ("There are 3 faults. I'd give it 7/10.", 7),
        ("It makes 3 claims. I would rate it a 7.", 7),
        ("It makes 3 claims. I give it a score of 7 out of 10.", 7),
        ("It loses 2 points, therefore 7/10.", 7),
        ("2 faults and 1 slip, so 7 out of 10.", 7),
        ("7 out of a possible 10", 7),
        ("**7** / **10**", 7),
        ("7\n\nIt has 3 good parts.", 7),
        ("It has 3 good parts.\n\n**7**", 7),
        ("3 faults.\n\n## Final Score\n7", 7),
        ("3 faults.\n\n**Score**\n\n**7**/10", 7),
        ("5 items.\nScore \u2013 7", 7),
        ("2 faults\nScore => 7", 7),
        ("2 faults. The score I assign is 7.", 7),
        ("Rate: 7. It misses 2 facts.", 7),
        ("3 faults <final_score>7</final_score>", 7),
        ("| Part | Score |\n|---|---|\n| Style | 6 |\n| **Overall** | **7** |", 7),
    ],
)
def test_written_score(text: str, value: int) -> None:
    score = written(text, 1, 10)
    assert score.value == value
    assert int(text[score.start : score.end]) == value  # places are those of the text, thinking included


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("good", "no integer"),
        ("7.5", "no integer"),
        ("7,5", "no integer"),
        ("1-10", "no integer"),
        ("v2", "no integer"),
        ("11", "outside the scale"),
        ("0", "outside the scale"),
        ("-7", "outside the scale"),
        ("7/8", "several"),
        ("7th", "no integer"),
        ("seven", "no integer"),
        ("6-7", "no integer"),
        ("between 1 and 10", "no integer"),
        ("<think>\nThe answer has 2", "thinking does not end"),
        ("<think>3</think>", "no integer"),
        ("Score: 7\nScore: 8", "several"),
        ("Style score: 7, rigour score: 8", "several"),
        ("Helpfulness: 8\nHonesty: 6", "several"),
        ("Score: 7 or 8", "several"),
        ("Score: 7/8", "several"),
        ("Overall: 7.5", "no integer"),
        ('{"score": 7.5, "faults": 3}', "no integer is stated"),
        ("Score: 7.5\nScore: 7", "no integer is stated"),
        ('{"score": null, "faults": 3}', "no integer is stated"),
        ("Score: - 5", "no integer is stated"),
        ("7%", "no integer"),
        ("minus 5", "no integer"),
        ("Score: \u22127", "outside the scale"),
        ("It has 2 faults. If it were shorter, I would give it 9.", "several"),
        ("It has 2 faults. I would give it at least 6.", "several"),
        ("I give clarity 6. I give style 9.", "several"),
        ("Accuracy: 6/10\nStyle: 9/10", "several"),
        ("It gets 8/10 of the 5 facts right", "several"),
        ("8\n\nIt has 3 parts.\n\n6", "several"),
        ("Somewhere between 6 and 8.", "several"),
        ("7 or 8", "several"),
        ("9" * 30, "outside"),
    ],
)
def test_what_is_no_score(text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        written(text, 1, 10)


@pytest.mark.parametrize(
    "text",
    [
        "Score: 7\nBecause the answer",
        "Score: 7. Because",
        '{"score": 7, "reason": "It is',
        "[[7]] since",
        "Overall: 7/9.\nIt",
    ],
)
def test_a_statement_before_the_cut_counts(text: str) -> None:
    assert written(text, 1, 9, cut=True).value == 7


@pytest.mark.parametrize(
    "text",
    [
        "7",
        "7.",
        "On a scale of 9 I would",
        "It has 3 faults, and",
        "Score: 7",
        "Score: 7.",
        "Score: 7 out",
        '{"score": 1',
    ],
)
def test_a_cut_answer_states_no_score_elsewhere(text: str) -> None:
    with pytest.raises(Unreadable, match="cut before it states a score"):
        written(text, 1, 9, cut=True)


def test_minus_signs_of_all_kinds_and_plus_count() -> None:
    for text, value in (("Score: \u22123", -3), ("\u22123", -3), ("Score: \u20133", -3), ("Score: +3", 3)):
        assert written(text, -5, 5).value == value


def test_a_pattern_finds_the_score() -> None:
    assert written("2 faults, grade A7, then B8", 1, 9, pattern=r"[A-Z](\d)").value == 8
    found = written("x=3 y=7", 1, 9, pattern=r"x=(\d) y=(?P<score>\d)")
    assert (found.value, found.start, found.end) == (7, 6, 7)
    assert written("<think>r: 3</think>r: 5", 1, 9, pattern=r"(?<=r: )\d").value == 5
    for text, reason in [
        ("no such thing", "no match of the pattern"),
        ("r: 12", "outside the scale"),
        ("r: 7/8", "several"),
        ("r: 7.5", "no integer"),
    ]:
        with pytest.raises(Unreadable, match=reason):
            written(text, 1, 9, pattern=r"r: ([\d.]+)")
    with pytest.raises(Unreadable, match="cut before"):
        written("r: 1", 1, 9, cut=True, pattern=r"r: (\d)")


def token(text: str, **chances: float) -> dict[str, Any]:
    """One place of the answer: its token, and the probability of each alternative (`_7` is " 7")."""
    listed = {name.replace("_", " ").removeprefix("d"): chance for name, chance in chances.items()}
    top = [
        {"token": name, "logprob": math.log(chance) if chance else -9999.0} for name, chance in listed.items()
    ]
    return {"token": text, "logprob": math.log(listed[text]), "top_logprobs": top}


def golden(text: str, tokens: list[dict[str, Any]], lowest: int, highest: int) -> float:
    return expected(text, tokens, written(text, lowest, highest), lowest, highest)


def test_expected_over_one_digit_by_hand() -> None:
    assert golden("4", [token("4", d4=0.6, d5=0.3, d3=0.1)], 1, 5) == pytest.approx(
        0.6 * 4 + 0.3 * 5 + 0.1 * 3
    )
    # Outside the scale and words: left out, the rest renormalised over 0.8.
    found = golden("4", [token("4", d4=0.5, d5=0.3, d9=0.1, Good=0.1)], 1, 5)
    assert found == pytest.approx((0.5 * 4 + 0.3 * 5) / 0.8)
    # With and without white space before it: one number. Not the first token; an end token follows.
    tokens = [
        token("Score:", Score=0.1, **{"Score:": 0.9}),
        token(" 2", _2=0.5, d2=0.25, _1=0.25),
        token("<|end|>", **{"<|end|>": 1.0}),
    ]
    assert golden("Score: 2", tokens, 1, 5) == pytest.approx(2 * 0.75 + 1 * 0.25)


def test_expected_where_ten_is_one_token() -> None:
    found = golden("9", [token("9", d9=0.5, d10=0.3, d1=0.2)], 1, 10)
    assert found == pytest.approx(0.5 * 9 + 0.3 * 10 + 0.2 * 1)
    assert golden("10", [token("10", d9=0.25, d10=0.75)], 1, 10) == pytest.approx(9.75)
    assert golden("1", [token("1", d1=0.5, d10=0.5)], 1, 10) == pytest.approx(5.5)


def test_expected_where_ten_is_two_tokens() -> None:
    # Written 10: P(1) = 0.6 goes on with 0 in 0.9 of cases, and ends in 0.1.
    ten = [token("1", d1=0.6, d9=0.4), token("0", d0=0.9, end=0.1)]
    assert golden("10", ten, 1, 10) == pytest.approx(0.54 * 10 + 0.06 * 1 + 0.4 * 9)
    # Written 1: the next token says how much of it would have been 10.
    one = [token("1", d1=0.6, d2=0.4), token("!", d0=0.2, **{"!": 0.8})]
    assert golden("1!", one, 1, 10) == pytest.approx(0.48 * 1 + 0.12 * 10 + 0.4 * 2)
    # Not written: 1 may be 1 or 10. Up to 1 % is left out, more is refused.
    assert golden("9", [token("9", d9=0.991, d1=0.009)], 1, 10) == 9
    with pytest.raises(Unreadable, match=r"probability 0.300 .* begin several numbers"):
        golden("9", [token("9", d9=0.7, d1=0.3)], 1, 10)
    with pytest.raises(Unreadable, match="begin several numbers"):  # the end's probability is not told
        golden("1", [token("1", d1=0.6, d2=0.4)], 1, 10)


def test_expected_refuses_too_little_mass_and_tokens_that_do_not_fit() -> None:
    with pytest.raises(Unreadable, match=r"only probability 0.400"):
        golden("4", [token("4", d4=0.4, Good=0.6)], 1, 5)
    assert golden("4", [token("4", d4=0.5, Good=0.5)], 1, 5) == 4
    with pytest.raises(Unreadable, match="do not spell"):
        golden("4", [token("5", d5=1.0)], 1, 5)
    with pytest.raises(Unreadable, match="shares its token ':4'"):
        golden(":4", [token(":4", **{":4": 1.0})], 1, 5)


def test_tokens_are_aligned_by_bytes() -> None:
    split = "\u4e2d".encode()
    pieces = [
        {"token": "\ufffd", "bytes": list(split[:2]), "logprob": -0.1},
        {"token": "\ufffd", "bytes": list(split[2:]), "logprob": -0.1},
    ]
    assert golden("\u4e2d3", [*pieces, token("3", d3=1.0)], 1, 5) == 3


def test_tokens_of_the_thinking_may_stand_before_the_answer() -> None:
    # A server that takes the thinking out of the text may leave its tokens among the log-probs.
    tokens = [token("7", d7=1.0), token("</think>", **{"</think>": 1.0}), token("7", d7=0.5, d5=0.5)]
    assert golden("7", tokens, 1, 9) == 6
    tokens[0] = token("2", d2=1.0)
    assert golden("2</think>7", tokens, 1, 9) == 6
    assert golden("\uff17", [token("\uff17", **{"\uff17": 0.75, "3": 0.25})], 1, 9) == 6
