"""Forms in which rows come, each as a whole file: what is loaded, and what is refused with its name."""

import json

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts

PAIR = {"chosen_field": "chosen", "rejected_field": "rejected"}
ANSWER = {"ground_truth_field": "answer"}
TRIES = {"completion_fields": ["tries"], "completion_reward_field": "r"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


Q = user("Question {n}?")
TALK = [user("hi"), assistant("hello"), Q]
#: name: (a row of each of twelve lines, settings, what is loaded: counts; or what the refusal says).
FORMS = {
    "consecutive user turns": ({"prompt": [Q, user("please")]}, {}, {}),
    "two system turns": ({"prompt": [system("a"), system("b"), Q]}, {}, {}),
    "a system turn last": ({"prompt": [Q, system("now answer")]}, {}, "ends with a turn of role 'system'"),
    "a prefilled answer": ({"prompt": [Q, assistant("It is")]}, {}, "ends with a turn of role 'assistant'"),
    "a conversation as a prompt": (
        {"messages": [Q, assistant("done")]},
        {"prompt_field": "messages"},
        "prompts.completion_fields, or cut the last turn",
    ),
    "a conversation as a completion": (
        {"messages": [Q, assistant("done")]},
        {"completion_fields": ["messages"]},
        {},
    ),
    "empty tool_calls": (
        {"prompt": [Q | {"tool_calls": [], "name": None}]},
        {},
        {"ignored_message_keys": 12},
    ),
    "a call of a tool": (
        {"prompt": [Q, assistant(None) | {"tool_calls": [{"id": "1"}]}, Q]},
        {},
        "'prompt', message 1, has tool_calls",
    ),
    "an answer of a tool": ({"prompt": [Q, {"role": "tool", "content": "5"}, Q]}, {}, "with tools are not"),
    "a developer's turn": (
        {"prompt": [{"role": "developer", "content": "x"}, Q]},
        {},
        "did you mean 'system'",
    ),
    "an empty completion": (
        {"prompt": "{n}?", "chosen": "yes", "rejected": ""},
        PAIR,
        {"empty_completions": 12},
    ),
    "a pair of equals": ({"prompt": "{n}?", "chosen": "a", "rejected": "a"}, PAIR, {"equal_pairs": 12}),
    "one side null": ({"prompt": "{n}?", "chosen": "a", "rejected": None}, PAIR, "'rejected' is null"),
    "pairs of several turns": (
        {"chosen": [*TALK, assistant("c")], "rejected": [*TALK, assistant("r")]},
        PAIR,
        {},
    ),
    "pairs that part early": (
        {"chosen": [*TALK, assistant("c")], "rejected": [user("hi"), assistant("hey"), Q, assistant("r")]},
        PAIR,
        "differ before their last message",
    ),
    "a prompt string, conversations with a system turn": (
        {
            "prompt": "Question {n}?",
            "chosen": [system("s"), Q, assistant("c")],
            "rejected": [system("s"), Q, assistant("r")],
        },
        PAIR,
        {},
    ),
    "one text, two grades": (
        {"prompt": "{n}?", "tries": [{"text": "a", "r": 1}, {"text": "a", "r": 0}]},
        TRIES,
        "with the reward 0.0, there with 1.0",
    ),
    "grades true, false, null": (
        {
            "prompt": "{n}?",
            "tries": [{"text": "a", "r": True}, {"text": "b", "r": False}, {"text": "c", "r": None}],
        },
        TRIES,
        {"ungraded_completions": 12},
    ),
    "a ground truth of 31 digits": ({"prompt": "{n}?", "answer": 10**30}, ANSWER, {}),
    "NaN as the ground truth": ({"prompt": "{n}?", "answer": float("nan")}, ANSWER, "not a JSON value"),
    "NaN beside it": ({"prompt": "{n}?", "answer": 1, "score": float("nan")}, ANSWER, {}),
    "no ground truth": ({"prompt": "{n}?", "answer": None}, ANSWER, {"without_ground_truth": 12}),
    "no column of the ground truth": ({"prompt": "{n}?"}, ANSWER, "no field 'answer'"),
    "a lonely surrogate": ({"prompt": "{n} \ud83d y"}, {}, "half of a surrogate pair"),
    "a line separator": ({"prompt": "Question {n}?\u2028line"}, {}, {}),
    "a NUL": ({"prompt": "Question {n}?\0x"}, {}, {}),
}


def write(path, row, text=None):
    lines = [json.dumps(row).replace("{n}", str(n)) + "\n" for n in range(12)]
    path.write_text("".join(lines) if text is None else text(lines))


@pytest.mark.parametrize("name", FORMS)
def test_a_form(tmp_path, name):
    row, fields, expected = FORMS[name]
    path = tmp_path / "rows.jsonl"
    write(path, row)
    config = PromptsConfig(kind="file", path=str(path), held_out=0.5, **fields)
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            load_prompts(config)
        assert expected in str(caught.value)
        assert f"{path}:1" in str(caught.value)
        return
    counts = load_prompts(config).counts
    assert counts["read"] == counts["prompts"] == 12
    always = {"read", "merged", "filtered", "prompts", "train", "held_out"}
    assert {key: count for key, count in counts.items() if key not in always} == expected


@pytest.mark.parametrize("second", ["1", 1.0, None, "01"])
def test_one_prompt_with_two_ground_truths(tmp_path, second):
    path = tmp_path / "rows.jsonl"
    again = json.dumps({"prompt": "3?", "answer": second}) + "\n"
    write(path, {"prompt": "{n}?", "answer": 1}, lambda lines: "".join([*lines, again]))
    with pytest.raises(DataError, match=r"jsonl:4 stands here with another ground truth \[.*jsonl:13\]"):
        load_prompts(PromptsConfig(kind="file", path=str(path), **ANSWER))


def test_prompts_that_differ_in_white_space_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    twins = "".join(json.dumps({"prompt": f"{n}? \n"}) + "\n" for n in range(3))
    write(path, {"prompt": "{n}?"}, lambda lines: "".join([*lines, twins]))
    counts = load_prompts(PromptsConfig(kind="file", path=str(path), held_out=0.5)).counts
    assert (counts["prompts"], counts["equal_but_for_space"]) == (15, 3)
