"""Where grades of completions stand, and how they are read."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.rows import check_columns, parse_row
from qrpo_core.data.sources import load_prompts


def config(**fields):
    return PromptsConfig(kind="file", path="rows.jsonl", **fields)


def rewards(row, notes=None, **fields):
    found = parse_row({"prompt": "Why?", **row}, "rows.jsonl:7", config(**fields), notes or Counter())
    return [completion.reward for completion in (*(found.pair or ()), *found.completions)]


def refused(row, **fields):
    with pytest.raises(DataError) as caught:
        rewards(row, **fields)
    assert caught.value.where == "rows.jsonl:7"
    return caught.value.message


ONE = {"completion_fields": ("a",), "completion_reward_field": "g"}


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"a": "x", "g": 3}, ONE, [3.0]),
        ({"a": "x", "g": None}, ONE, [None]),
        ({"a": None, "g": 3}, ONE, []),
        ({"a": [{"role": "assistant", "content": "x"}], "g": True}, ONE, [1.0]),
        ({"a": {"role": "assistant", "content": "x"}, "g": False}, ONE, [0.0]),
        ({"a": {"text": "x"}, "g": 3}, ONE, [3.0]),
        ({"a": {"text": "x", "g": 5}, "g": 3}, ONE, [5.0]),  # its own goes first
        ({"a": ["x", "y"], "g": [1, None]}, ONE, [1.0, None]),
        ({"a": [{"text": "x"}, {"text": "y"}], "g": [1, 2]}, ONE, [1.0, 2.0]),
        ({"a": ["x"], "g": [1]}, ONE, [1.0]),
        (
            {"a": [{"role": "assistant", "content": "x"}, {"from": "gpt", "value": "y"}], "g": [1, 2]},
            ONE,
            [1.0, 2.0],
        ),
        (
            {"a": ["x", "y"], "m": [{"g": "4"}, {"g": "N/A"}]},
            ONE | {"completion_reward_field": "m.g"},
            [4.0, None],
        ),
        (
            {"m": [{"t": "x", "g": 1}, {"t": "y", "g": 2}]},
            {"completion_fields": ("m.t",), "completion_reward_field": "m.g"},
            [1.0, 2.0],
        ),
        ({"a": [], "g": []}, ONE, []),
        ({"a": "x", "m": {"g": 2}}, ONE | {"completion_reward_field": "m.g"}, [2.0]),
        ({"a": {"text": "x", "m": {"g": 2}}}, ONE | {"completion_reward_field": "m.g"}, [2.0]),
        ({"a": {"text": "x", "m": None}}, ONE | {"completion_reward_field": "m.g"}, [None]),
        ({"a": {"b": {"c": "x"}, "g": 2}}, ONE | {"completion_text_field": "b.c"}, [2.0]),
        ({"a": ["x", "y"], "rank": [1, 2]}, ONE | {"completion_reward_field": "-rank"}, [-1.0, -2.0]),
        ({"a": ["x", "y"], "rank": [1, 2]}, ONE | {"completion_reward_field": "+rank"}, [1.0, 2.0]),
        (
            {"a": "x", "b": "y", "p": -3},
            {"completion_fields": ("a", "b"), "completion_reward_fields": ("-p", "p")},
            [3.0, -3.0],
        ),
        (
            {"a": ["x", "y"], "b": "z", "p": [1, 2], "q": 3},
            {"completion_fields": ("a", "b"), "completion_reward_fields": ("p", "q")},
            [1.0, 2.0, 3.0],
        ),
        (
            {"a": ["x", "y"], "p": [1, 2], "q": [10, None]},
            {"completion_fields": ("a",), "completion_reward_weights": {"p": 0.5, "q": -2}},
            [-19.5, None],
        ),
        (
            {"c": "x", "r": "y", "s": 8.5, "t": "4"},
            {"chosen_field": "c", "rejected_field": "r"}
            | {"chosen_reward_field": "s", "rejected_reward_field": "-t"},
            [8.5, -4.0],
        ),
    ],
)
def test_where_a_grade_stands(row, fields, expected):
    assert rewards(row, **fields) == expected


@pytest.mark.parametrize(
    ("row", "fields", "says"),
    [
        ({"a": "x"}, ONE, "'a' is a string, and the row has no column 'g' with its grade"),
        ({"a": {"text": "x"}}, ONE, "'a' has no 'g', nor has the row a column of that name"),
        (
            {"a": ["x", "y"], "g": [1]},
            ONE,
            "item 0 of 'a' is one of 2 completions, and their grades 'g' are a",
        ),
        ({"a": ["x", "y"], "g": 1}, ONE, "and their grades 'g' are an integer"),
        ({"a": "x", "g": [1]}, ONE, "'g' is [1], not a number"),
        ({"a": "x", "g": "good"}, ONE, "'g' is 'good', not a number"),
        ({"a": "x", "g": "95%"}, ONE, "'g' is '95%', not a number"),
        ({"a": "x", "g": "\u0663"}, ONE, "not a number"),
        (
            {"a": ["x", "y"], "m": [{"g": 1}, {}]},
            ONE | {"completion_reward_field": "m.g"},
            "has no column 'm.g'",
        ),
        ({"a": ["x"], "g": ["good"]}, ONE, "item 0 of 'g' is 'good', not a number"),
        ({"a": "x", "g": float("inf")}, ONE, "'g' is inf"),
        (
            {"a": "x", "b": "y", "g": 1},
            ONE | {"completion_fields": ("a", "b")},
            "column 'g' would grade the completions of all fields alike",
        ),
        (
            {"c": "x", "r": "y", "s": 1},
            {"chosen_field": "c", "rejected_field": "r"}
            | {"chosen_reward_field": "s", "rejected_reward_field": "t"},
            "no field 't'",
        ),
    ],
)
def test_grades_that_do_not_fit_are_refused(row, fields, says):
    assert says in refused(row, **fields)


@given(st.floats(-1e100, 1e100) | st.integers(-(2**70), 2**70))
def test_a_text_grades_as_the_number_that_it_spells(number):
    assert rewards({"a": "x", "g": repr(number)}, **ONE) == [float(number)]
    assert rewards({"a": "x", "g": f" {number!r} "}, **ONE) == rewards({"a": "x", "g": number}, **ONE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", 1.0), ("False", 0.0), (".5", 0.5), ("+3.", 3.0), ("", None), ("N/A", None), ("NA", None)],
)
def test_texts_that_grade(text, expected):
    notes = Counter()
    assert rewards({"a": "x", "g": text}, notes, **ONE) == [expected]


def test_less_is_better_has_no_minus_zero():
    (found,) = rewards({"a": "x", "g": 0}, **ONE | {"completion_reward_field": "-g"})
    assert str(found) == "0.0"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (ONE | {"completion_reward_field": "rank"}, "write '-rank' if less is better and '+rank'"),
        (ONE | {"completion_reward_field": "answers.Rank"}, "does not say whether more is better"),
        (ONE | {"completion_reward_field": "eval_loss"}, "does not say whether more is better"),
        (ONE | {"completion_reward_field": "bestRank"}, "does not say whether more is better"),
        (ONE | {"completion_reward_field": "RANK"}, "does not say whether more is better"),
        (
            {"chosen_field": "c", "rejected_field": "r"}
            | {"chosen_reward_field": "rank_chosen", "rejected_reward_field": "rank_rejected"},
            "prompts.chosen_reward_field 'rank_chosen' does not say",
        ),
        (ONE | {"completion_reward_weights": {"g": 1}}, "exclude each other"),
        (
            {"completion_fields": ("a", "b"), "completion_reward_fields": ("g",)},
            "names 1 grades for the 2 prompts.completion_fields",
        ),
        (
            {"completion_reward_weights": {"g": 1}},
            "completion_reward_weights needs prompts.completion_fields",
        ),
        (
            {"chosen_field": "c", "rejected_field": "r", "chosen_reward_field": "g"},
            "chosen_reward_field and prompts.rejected_reward_field come together",
        ),
        (
            {"chosen_reward_field": "g", "rejected_reward_field": "h"},
            "chosen_reward_field needs prompts.chosen_field",
        ),
        ({"completion_fields": ("a",), "completion_reward_weights": {"g": float("nan")}}, "finite number"),
    ],
)
def test_settings_that_cannot_be_meant(fields, says):
    with pytest.raises(ValidationError, match="(?s)" + says.replace("+", "[+]")):
        config(**fields)


@pytest.mark.parametrize("name", ["score", "helpfulness", "rating", "frank", "closs"])
def test_other_names_need_no_sign(name):
    assert config(**ONE | {"completion_reward_field": name}).graded


def test_columns_of_grades():
    known = ["prompt", "a", "g", "m", "s", "x"]
    assert check_columns(known, config(**ONE), "t") == ["prompt", "a", "g"]
    assert check_columns(["prompt", "a"], config(**ONE), "t") == ["prompt", "a"]  # it may stand inside
    inner = ONE | {"completion_reward_field": "-m.g", "system_field": "s"}
    assert check_columns(known, config(**inner), "t") == ["prompt", "s", "a", "m"]
    pair = {"chosen_field": "a", "rejected_field": "x", "chosen_reward_field": "-g"}
    assert check_columns(known, config(**pair, rejected_reward_field="m"), "t") == [
        "prompt",
        "a",
        "x",
        "g",
        "m",
    ]
    with pytest.raises(DataError, match="no column 'n'"):
        check_columns(known, config(**pair, rejected_reward_field="n"), "t")


def test_rows_of_one_prompt_become_its_completions(tmp_path):
    rows = [
        {"prompt": f"Question {n // 2}?", "response": f"answer {n % 2}", "helpfulness": n % 5}
        for n in range(24)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"completion_fields": ("response",), "completion_reward_field": "helpfulness"}
    found = load_prompts(PromptsConfig(kind="file", path=str(path), **fields))
    assert (found.counts["prompts"], found.counts["merged"], found.offline.num_rows) == (12, 12, 24)
    assert found.offline["reward"].to_pylist() == [float(n % 5) for n in range(24)]
    assert found.offline["source"][5].as_py() == f"{path}:6, 'response'"


def test_a_completion_in_two_pairs_has_one_reward(tmp_path):
    rows = [
        {"prompt": "Q?", "c": "x", "r": "y", "s": 3, "t": 1},
        {"prompt": "Q?", "c": "x", "r": "z", "s": 3, "t": 2},
        *({"prompt": f"{n}?", "c": "x", "r": "y", "s": 0, "t": 0} for n in range(12)),
    ]
    fields = {"chosen_field": "c", "rejected_field": "r"}
    fields |= {"chosen_reward_field": "s", "rejected_reward_field": "t"}
    path = tmp_path / "rows.jsonl"

    def load():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(PromptsConfig(kind="file", path=str(path), **fields)).offline.to_pylist()

    assert [(row["text"], row["pair"], row["reward"]) for row in load()[:4]] == [
        ("x", 0, 3.0),
        ("y", 0, 1.0),
        ("x", 1, 3.0),
        ("z", 1, 2.0),
    ]
    rows[1]["s"] = 4
    with pytest.raises(DataError, match=r"stands in 'c' with the reward 4.0, there with 3.0 .*jsonl:2"):
        load()
