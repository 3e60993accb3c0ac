"""Forms of conversations: text parts, ShareGPT, single messages, and strings that hold conversations."""

import json
from collections import Counter

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.rows import parse_row

ASK = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "So."}
BAD = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIRS = {"chosen_field": "chosen", "rejected_field": "rejected"}


def parse(row, notes=None, **fields):
    config = PromptsConfig(kind="file", path="rows.jsonl", **fields)
    return parse_row(row, "rows.jsonl:7", config, Counter() if notes is None else notes)


def messages(prompt, **fields):
    return parse({"prompt": prompt}, **fields).messages


def refused(row, **fields):
    with pytest.raises(DataError) as caught:
        parse(row, **fields)
    assert caught.value.where == "rows.jsonl:7"
    return str(caught.value)


def part(text):
    return {"type": "text", "text": text}


def speak(who, text):
    return {"from": who, "value": text}


@pytest.mark.parametrize(
    "prompt",
    [
        "Why?",
        ASK,
        [ASK],
        [speak("human", "Why?")],
        [speak("user", "Why?") | {"weight": None}],
        speak("human", "Why?"),
        [{"role": "user", "content": [part("Why?")]}],
        [{"role": "user", "content": [part("Wh"), part("y?") | {"image_url": None}]}],
        [ASK | {"tool_calls": [], "images": None}],
    ],
)
def test_forms_of_one_prompt(prompt):
    assert messages(prompt) == [ASK]


def test_a_sharegpt_conversation():
    turns = [
        speak("system", "Be brief."),
        speak("human", "Hi"),
        speak("gpt", "Hello."),
        speak("human", "Why?"),
    ]
    assert messages(turns) == [
        SYSTEM,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        ASK,
    ]


@pytest.mark.parametrize("side", [GOOD, [GOOD], [ASK, GOOD], speak("gpt", "So."), "So."])
def test_forms_of_one_completion(side):
    found = parse({"prompt": "Why?", "chosen": side, "rejected": "No."}, **PAIRS)
    assert [completion.text for completion in found.pair] == ["So.", "No."]
    graded = parse({"prompt": "Why?", "a": side}, completion_fields=("a",)).completions
    assert [completion.text for completion in graded] == ["So."]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            {"role": "user", "content": [part("x"), {"type": "image_url", "image_url": {"url": "u"}}]},
            "part 1 of the content of 'prompt', message 0, is of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "image"}]}, "is of type 'image'"),
        ({"role": "user", "content": ["x"]}, "part 0 of the content of 'prompt', message 0, is a string"),
        ({"role": "user", "content": {"text": "x"}}, "content of 'prompt', message 0, is an object"),
        (
            ASK | {"images": ["a.png"]},
            "'prompt', message 0, has images [rows.jsonl:7]: media are not covered",
        ),
        (GOOD | {"tool_calls": [{}], "content": None}, "has tool_calls"),
        (GOOD | {"reasoning_content": "Hm."}, "has reasoning_content [rows.jsonl:7]: thoughts outside"),
        ({"role": "tool", "content": "5"}, "unknown role 'tool'"),
        ({"role": "developer", "content": "5"}, "did you mean 'system'?"),
        (speak("observation", "5"), "conversations with tools are not covered"),
        (speak("human", None), "content of 'prompt', message 0, is null"),
    ],
)
def test_what_a_conversation_cannot_carry(message, says):
    assert says in refused({"prompt": [message, ASK]})


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, ASK]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("form", "text", "turns"),
    [
        ("json", json.dumps(TALK), TALK),
        ("json", json.dumps([speak("human", "Why?")]), [ASK]),
        ("json", json.dumps(ASK), [ASK]),
        ("json", '["Why?"]', [ASK]),
        ("json", json.dumps(json.dumps([ASK])), [ASK]),
        ("transcript", TRANSCRIPT, TALK),
        ("transcript", TRANSCRIPT.lstrip() + " ", TALK),
        ("transcript", "### Human: Hi### Assistant: Hello.\n### Human: Why?", TALK),
        ("transcript", "USER: Hi ASSISTANT: Hello. USER: Why? ASSISTANT:", TALK),
        (
            "transcript",
            "Human: a\n\nb Human: c\n\nAssistant: ",
            [{"role": "user", "content": "a\n\nb Human: c"}],
        ),
    ],
)
def test_strings_that_hold_turns(form, text, turns):
    assert messages(text, string_format=form) == turns
    assert messages(text, string_format="text") == [{"role": "user", "content": text}]
    assert f"set prompts.string_format to {form}" in refused({"prompt": text})


def test_turns_of_users_are_a_transcript_only_by_the_setting():
    text = "User: Hi\nAssistant: Hello.\nUser: Why?\nAssistant:"
    assert messages(text, string_format="transcript") == TALK
    assert messages(text) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "text",
    [
        "Human: who is that?",
        "User: Assistant",
        "User: what does an Assistant: label mean?",
        'Explain [{"role": "user", "content": "x"}]',
        '{"role": "user"}',
        '[{"role": "user"}]',
        '[{"name": "from"}]',
        "[1, 2]",
        '["a", 1]',
        "[" * 100_000 + '"role"',
        "Is the role of a human: assistant?",
    ],
)
def test_text_that_is_only_like_them(text):
    assert messages(text) == [{"role": "user", "content": text}]


def test_an_answer_may_be_a_list_of_strings_but_not_messages():
    row = {"prompt": "Why?", "chosen": '["a", "b"]', "rejected": json.dumps([ASK, BAD])}
    assert "'rejected' is a string that holds messages written as JSON" in refused(row, **PAIRS)
    found = parse(row | {"rejected": "x"}, **PAIRS)
    assert found.pair[0].text == '["a", "b"]'


def test_messages_as_a_python_literal_are_refused():
    for text in (str([ASK]), f"array([{ASK}], dtype=object)", f"[ {ASK}\n {GOOD}]"):
        message = refused({"prompt": text})
        assert "'prompt' is a string that holds messages as a Python literal" in message


@pytest.mark.parametrize("form", ["json", "transcript"])
def test_a_prompt_of_no_such_form_is_refused(form):
    message = refused({"prompt": " Why?"}, string_format=form)
    assert f"'prompt' is a string that is no {form} of turns" in message


def test_transcripts_in_pairs():
    fields = PAIRS | {"string_format": "transcript"}
    whole = parse({"chosen": TRANSCRIPT + " So.", "rejected": TRANSCRIPT + " No. "}, **fields)
    split = parse({"prompt": TRANSCRIPT, "chosen": " So.", "rejected": " No."}, **fields)
    for found in (whole, split):
        assert found.messages == TALK
        assert [completion.text for completion in found.pair] == ["So.", "No."]
    early = {"chosen": TRANSCRIPT + " So.", "rejected": TRANSCRIPT.replace("Hello", "Hey") + " No."}
    assert "differ before their last message" in refused(early, **fields)
    assert "'rejected' has no answer" in refused(early | {"rejected": TRANSCRIPT}, **fields)


def test_a_column_of_system_turns():
    def load(row, **fields):
        return parse(row, system_field="s", **fields).messages

    assert load({"prompt": "Why?", "s": "Be brief."}) == [SYSTEM, ASK]
    assert load({"prompt": "Why?", "s": ""}) == load({"prompt": "Why?", "s": None}) == [ASK]
    assert load({"prompt": [SYSTEM, ASK], "s": "Be brief."}) == [SYSTEM, ASK]
    assert load({"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "s": "Be brief."}, **PAIRS) == [SYSTEM, ASK]
    assert "has a system turn, and 's' another one" in refused(
        {"prompt": [SYSTEM, ASK], "s": "x"}, system_field="s"
    )
    assert "'s' is a list" in refused({"prompt": "Why?", "s": ["x"]}, system_field="s")
    assert "no field 's'" in refused({"prompt": "Why?"}, system_field="s")


def test_fields_inside_fields():
    row = {"extra": {"ask": "Why?", "answer": 3}, "a.b": 4, "none": None}

    def ground_truth(name):
        return parse(row, prompt_field="extra.ask", ground_truth_field=name).ground_truth

    assert (ground_truth("extra.answer"), ground_truth("a.b"), ground_truth("none.at.all")) == (3, 4, None)
    message = refused(row, prompt_field="extra.ask", ground_truth_field="extra.answr")
    assert "no field 'extra.answr' [rows.jsonl:7]: did you mean 'extra.answer'?" in message
    assert "no field 'extra.ask.x'" in refused(row, prompt_field="extra.ask.x")
