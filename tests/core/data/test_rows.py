"""What one row of a source may look like."""

from collections import Counter

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.rows import check_columns, parse_row

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}


def config(**fields):
    return PromptsConfig(kind="file", path="rows.jsonl", **fields)


def pairs(**fields):
    return config(chosen_field="chosen", rejected_field="rejected", **fields)


def parse(row, fields=None, notes=None):
    return parse_row(row, "rows.jsonl:7", fields or config(), Counter() if notes is None else notes)


def texts(parsed):
    return tuple(side.text for side in parsed.pair)


def refused(row, fields=None):
    with pytest.raises(DataError) as caught:
        parse(row, fields)
    assert caught.value.where == "rows.jsonl:7"
    return str(caught.value)


def test_string_prompt_is_one_user_turn():
    assert parse({"prompt": " Why? "}).messages == [{"role": "user", "content": " Why? "}]


def test_whole_conversation_is_kept():
    turns = [SYSTEM, ASK, GOOD, ASK]
    assert parse({"prompt": turns}).messages == turns


@pytest.mark.parametrize("value", [3, "4", 0.5, [1], {"a": None}, False, "", 0])
def test_ground_truth_is_any_json_value(value):
    notes = Counter()
    assert parse({"prompt": "x", "a": value}, config(ground_truth_field="a"), notes).ground_truth == value
    assert not notes["without_ground_truth"]


def test_null_ground_truth_is_counted():
    notes = Counter()
    assert parse({"prompt": "x", "a": None}, config(ground_truth_field="a"), notes).ground_truth is None
    assert notes["without_ground_truth"] == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"promt": "x"}, "no field 'prompt' [rows.jsonl:7]: did you mean 'promt'?"),
        ({"q": "x", "a": 1}, "known here: a, q"),
        ({"prompt": 3}, "'prompt' is an integer"),
        ({"prompt": None}, "'prompt' is null"),
        ({"prompt": {"text": "x"}}, "'prompt' is an object"),
        ({"prompt": ["Why?"]}, "'prompt', message 0, is a string"),
        ({"prompt": []}, "the prompt has no messages"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": [SYSTEM, {"role": "user", "content": ""}]}, "the prompt is empty"),
        ({"prompt": [SYSTEM]}, "ends with a turn of role 'system'"),
        ({"prompt": [ASK, GOOD]}, "ends with a turn of role 'assistant'"),
        ({"prompt": [{"content": "x"}]}, "message 0, has no role"),
        ({"prompt": [ASK, {"role": "user"}]}, "message 1, has no content"),
        ({"prompt": [{"from": "human", "text": "x"}]}, "message 0, has no role"),
        ({"prompt": [{"role": "user", "content": None}]}, "content of 'prompt', message 0, is null"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            "part 0 of the content of 'prompt', message 0, is of type",
        ),
        ({"prompt": [{"role": "human", "content": "x"}]}, "unknown role 'human' in 'prompt', message 0"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "did you mean 'user'?"),
        ({"prompt": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "conversations with tools are not covered"),
        ({"prompt": [ASK, GOOD | {"tool_calls": [{"id": 1}]}, ASK]}, "message 1, has tool_calls"),
    ],
)
def test_refused_prompts(row, says):
    assert says in refused(row)


def test_extra_keys_are_counted_and_null_ones_are_nothing():
    notes = Counter()
    message = ASK | {"name": "Ada", "weight": 1, "tool_calls": None}
    assert parse({"prompt": [message]}, None, notes).messages == [ASK]
    assert notes == {"ignored_message_keys": 2}


def test_missing_ground_truth_is_refused():
    assert "no field 'answer'" in refused({"prompt": "x", "anser": 1}, config(ground_truth_field="answer"))


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, ASK]),
        ({"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [ASK]),
        ({"prompt": "Why?", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, [SYSTEM, ASK]),
        ({"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, [SYSTEM, ASK]),
        ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, [ASK]),
        ({"chosen": [ASK, GOOD, ASK, GOOD], "rejected": [ASK, GOOD, ASK, BAD]}, [ASK, GOOD, ASK]),
    ],
)
def test_shapes_of_pairs(row, messages):
    parsed = parse(row, pairs())
    assert parsed.messages == messages
    assert texts(parsed) == ("Because.", "No.")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Why?", "chosen": "Because."}, "no field 'rejected'"),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": None}, "'rejected' is null"),
        ({"prompt": "Why?", "chosen": 1, "rejected": 2}, "'chosen' is an integer"),
        ({"prompt": "Why?", "chosen": [ASK], "rejected": [ASK]}, "'chosen' has no answer"),
        ({"prompt": "Why?", "chosen": [], "rejected": []}, "'chosen' has no answer"),
        ({"chosen": "Because.", "rejected": "No."}, "no field 'prompt'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no field 'prompt'"),
        ({"chosen": [ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]}, "differ before their last message"),
        ({"prompt": "How?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "not start with the prompt"),
        (
            {"prompt": [ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
            "not start with the prompt",
        ),
        ({"chosen": [ASK, GOOD, GOOD], "rejected": [ASK, GOOD, BAD]}, "ends with a turn of role 'assistant'"),
    ],
)
def test_refused_pairs(row, says):
    assert says in refused(row, pairs())


def test_a_prompt_field_that_was_set_must_be_there():
    row = {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    assert "no field 'question'" in refused(row, pairs(prompt_field="question"))


def test_rows_without_pair_and_empty_completions_are_counted():
    notes = Counter()
    assert parse({"prompt": "x", "chosen": None, "rejected": None}, pairs(), notes).pair is None
    assert parse({"prompt": "x", "chosen": "", "rejected": "no"}, pairs(), notes).pair is not None
    assert notes == {"without_pair": 1, "empty_completions": 1}


def test_columns():
    assert check_columns(["id", "chosen", "rejected"], pairs(), "t") == ["chosen", "rejected"]
    with pytest.raises(DataError, match=r"no column 'answer' .* did you mean 'answers'"):
        check_columns(["prompt", "answers"], config(ground_truth_field="answer"), "t")
    with pytest.raises(DataError, match="no column 'prompt'"):
        check_columns(["text"], config(), "t")
