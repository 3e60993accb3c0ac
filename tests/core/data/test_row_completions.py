"""What the completions of one row may look like, and what is refused."""

from collections import Counter

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.rows import check_columns, parse_row
from tests.core.data.completion_rows import ASK, BARE, GRADED, SYSTEM, answer, good


def one(value, b=None):
    return {"prompt": "Question 0?", "a": value, "b": b}


def parse(row, notes=None, **fields):
    config = PromptsConfig(kind="file", path="rows.jsonl", **fields)
    return parse_row(row, "rows.jsonl:7", config, Counter() if notes is None else notes)


def completions(row, **fields):
    """[(text, reward)] of the completions of a row."""
    return [(found.text, found.reward) for found in parse(row, **fields).completions]


def refused(row, **fields):
    with pytest.raises(DataError) as caught:
        parse(row, **(fields or GRADED))
    assert caught.value.where == "rows.jsonl:7"
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (good("x"), [("x", 1.0)]),
        (good("x", True), [("x", 1.0)]),
        (good("x", False), [("x", 0.0)]),
        (good("x", -2.5), [("x", -2.5)]),
        (good("x", None), [("x", None)]),
        ([good("x"), good("y", 0)], [("x", 1.0), ("y", 0.0)]),
        (good([ASK, answer("x")]), [("x", 1.0)]),
        ([good([answer("x")]), good("y")], [("x", 1.0), ("y", 1.0)]),
        ([], []),
    ],
)
def test_shapes_of_graded_completions(value, expected):
    assert completions(one(value), **GRADED) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ({"text": "x", "votes": 3}, ["x"]),
        (["x", {"text": "y"}, [ASK, answer("z")]], ["x", "y", "z"]),
        ([answer("x")], ["x"]),
        ([ASK, answer("x")], ["x"]),
        ([[ASK, answer("x")], [ASK, answer("y")]], ["x", "y"]),
    ],
)
def test_shapes_of_completions_without_grade(value, expected):
    found = completions(one(value), **BARE)
    assert found == [(text, None) for text in expected]


def test_the_turns_of_a_message_can_be_the_completions():
    """With completion_text_field content a list of assistant turns is several completions, not one."""
    turns = [answer("x") | {"grade": 1}, answer("y") | {"grade": 0}]
    found = completions(one(turns), **GRADED, completion_text_field="content")
    assert found == [("x", 1.0), ("y", 0.0)]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("x", "'a' is a string, and the row has no column 'grade' with its grade"),
        (["x"], "item 0 of 'a' is a string, and the row has no column"),
        ([ASK, answer("x")], "'a' is a list, and the row has no column"),
        (3, "'a' is an integer"),
        (True, "a completion is a string, a list of messages or an object with 'text'"),
        ([good("x"), None], "item 1 of 'a' is null"),
        ({"txt": "x", "grade": 1}, "'a' has no 'text' [rows.jsonl:7]: did you mean 'txt'?"),
        (
            {"text": "x", "grad": 1},
            "'a' has no 'grade', nor has the row a column of that name [rows.jsonl:7]: did you mean 'grad'?",
        ),
        ([good("x"), {"text": "x"}], "item 1 of 'a' has no 'grade'"),
        (good(None), "'text' of 'a' is null"),
        (good({"text": "x"}), "'text' of 'a' is an object"),
        (good([ASK]), "'text' of 'a' has no answer"),
        (good(["x"]), "'text' of 'a', message 0, is a string"),
        (good("x", "A"), "'grade' of 'a' is 'A', not a number"),
        (good("x", "4/5"), "a finite number, true or false; give null where there is none"),
        (good("x", "1_0"), "'grade' of 'a' is '1_0', not a number"),
        (good("x", "nan"), "'grade' of 'a' is 'nan', not a number"),
        (good("x", "1e999"), "'grade' of 'a' is inf"),
        (good("x", 1e300), "'grade' of 'a' is 1e+300, which is beyond 1e+100"),
        (good("x", [1]), "'grade' of 'a' is [1], not a number"),
        (good("x", float("nan")), "'grade' of 'a' is nan"),
        (good("x", float("-inf")), "'grade' of 'a' is -inf"),
        (good("x", 10**400), "'grade' of 'a' is inf"),
        (good([ASK | {"content": "Why?"}, answer("x")]), "'a' is a conversation that does not start with"),
    ],
)
def test_refused_completions(value, says):
    assert says in refused(one(value))


def test_a_missing_column_is_refused():
    assert "no field 'b'" in refused({"prompt": "x", "a": good("x")})


def test_a_conversation_without_a_question():
    message = refused({"a": [SYSTEM, answer("x")], "b": None}, **BARE)
    assert "the prompt in 'prompt' ends with a turn of role 'system'" in message


def test_conversations_of_one_row_that_differ():
    row = one([ASK, answer("x")], [SYSTEM, ASK, answer("y")])
    assert "'a' and 'b' differ before their last message" in refused(row, **BARE)


def test_a_turn_is_not_taken_for_a_completion():
    message = refused(one([ASK, answer("x")]), **BARE, completion_text_field="content")
    assert "item 0 of 'a' is a turn of role 'user', not a completion" in message
    assert "name another prompts.completion_text_field" in message


def test_columns_of_completions():
    graded = PromptsConfig(kind="file", path="t", **BARE)
    assert check_columns(["a", "id", "b", "prompt"], graded, "t") == ["prompt", "a", "b"]
    assert check_columns(["a", "b"], graded, "t") == ["a", "b"]
    with pytest.raises(DataError, match=r"no column 'b' \[t\]: known here: a, prompt"):
        check_columns(["a", "prompt"], graded, "t")
    named = PromptsConfig(kind="file", path="t", **BARE, prompt_field="question")
    with pytest.raises(DataError, match="no column 'question'"):
        check_columns(["a", "b"], named, "t")
