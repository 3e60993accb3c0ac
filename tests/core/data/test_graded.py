"""Completions that a data set brings: graded ones, and the identity that they share with pairs."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import OFFLINE
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts
from tests.core.data.completion_rows import ASK, BARE, GRADED, SYSTEM, answer, good

GSM8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k" / "model_solutions_400.jsonl"


def load(folder, rows, **fields):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(PromptsConfig(kind="file", path=str(path), **({"held_out": 0.3} | fields)))


def others(count=12):
    """Prompts without completions, so that a split has two sides."""
    return [{"prompt": f"Other {number}?", "a": None, "b": None} for number in range(count)]


def of(folder, rows, **fields):
    """[(text, reward)] of the completions that some rows give, and what was loaded."""
    found = load(folder, [*rows, *others()], **fields)
    return list(zip(*(found.offline[name].to_pylist() for name in ("text", "reward")), strict=True)), found


def one(value, b=None):
    return {"prompt": "Question 0?", "a": value, "b": b}


def test_a_conversation_gives_the_prompt(tmp_path):
    for row in ({"a": [SYSTEM, ASK, answer("x")], "b": "y"}, one([SYSTEM, ASK, answer("x")], "y")):
        texts, found = of(tmp_path, [row], **BARE)
        assert found.prompts["messages"][0].as_py() == [SYSTEM, ASK]
        assert texts == [("x", None), ("y", None)]


def test_the_table(tmp_path):
    found = load(tmp_path, [one([good("x"), good("y", 0.5)], good("z", None)), *others()], **GRADED)
    assert found.offline.schema.equals(OFFLINE, check_metadata=True)
    place, prompt = f"{tmp_path / 'rows.jsonl'}:1", hashing.prompt_id([ASK])
    assert found.offline.to_pylist() == [
        {
            "prompt_id": prompt,
            "sample_index": hashing.completion_index(text),
            "text": text,
            "label": "",
            "pair": None,
            "reward": reward,
            "source": f"{place}, {field}",
        }
        for text, reward, field in (
            ("x", 1, "item 0 of 'a'"),
            ("y", 0.5, "item 1 of 'a'"),
            ("z", None, "'b'"),
        )
    ]


def test_what_is_counted(tmp_path):
    rows = [
        one(good("x"), good("x", True)),
        one(good("", None), good("y", None)),
        one(good("y", None)),
        one(None),
        one([]),
    ]
    found = load(tmp_path, [*rows, *others()], **GRADED)
    assert found.counts == {
        "read": 17,
        "merged": 4,
        "filtered": 0,
        "prompts": 13,
        "train": found.counts["train"],
        "held_out": found.counts["held_out"],
        "empty_completions": 1,
        "ungraded_completions": 3,
        "repeated_completions": 2,
        "without_completions": 14,
    }
    assert sorted(found.offline["text"].to_pylist()) == ["", "x", "y"]


def test_without_a_reward_field_nothing_is_ungraded(tmp_path):
    _, found = of(tmp_path, [one("x"), one({"text": "x", "grade": 3})], **BARE)
    assert "ungraded_completions" not in found.counts
    assert found.counts["repeated_completions"] == 1


def test_a_merged_row_adds_its_completions(tmp_path):
    conversation = {"prompt": [ASK], "a": good("y", 0), "b": good("x")}
    found, loaded = of(tmp_path, [one(good("x")), *others(3), conversation], **GRADED)
    assert found == [("x", 1.0), ("y", 0.0)]
    assert len(set(loaded.offline["prompt_id"].to_pylist())) == 1


def test_completions_of_prompts_beyond_the_limit_are_left_with_them(tmp_path):
    rows = [{"prompt": f"{n}?", "a": good(f"x{n}"), "b": None} for n in range(20)]
    found = load(tmp_path, [*rows, *rows], **GRADED, limit=15)
    assert found.offline["text"].to_pylist() == [f"x{n}" for n in range(15)]
    assert found.counts["filtered"] == 5
    assert found.counts["repeated_completions"] == 15


@pytest.mark.parametrize(("second", "shown"), [(0, "0.0"), (None, "null")])
def test_unequal_rewards_of_one_completion_are_refused_with_both_rows(tmp_path, second, shown):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError) as caught:
        load(tmp_path, [one(good("x")), *others(2), one(None, good("x", second))], **GRADED)
    assert str(caught.value) == (
        f"the completion of {path}:1, 'a' stands in 'b' with the reward {shown}, there with 1.0 [{path}:4]: "
        "keep one of the two, or give both the same reward"
    )
    with pytest.raises(DataError, match=r"stands in item 1 of 'a' with the reward .*jsonl:1\]"):
        load(tmp_path, [one([good("x"), good("x", second)])], **GRADED)


def test_half_of_a_surrogate_pair_is_named_by_its_row(tmp_path):
    with pytest.raises(DataError, match=r"half of a surrogate pair \[.*jsonl:13\]"):
        load(tmp_path, [*others(), one(good("\ud800"))], **GRADED)


def test_the_same_text_of_another_prompt_may_have_another_reward(tmp_path):
    found, _ = of(tmp_path, [one(good("x")), {"prompt": "Why?", "a": good("x", 0), "b": None}], **GRADED)
    assert found == [("x", 1.0), ("x", 0.0)]


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_tables_give_what_lines_give(tmp_path, kind):
    rows = [
        {
            "prompt": f"Question {n}?",
            "a": None if n % 3 else good(f"x{n}", n % 2 == 0),
            "b": [good(f"y{n}", n > 9), good(f"z{n}", None)],
            "ignored": n,
        }
        for n in range(20)
    ]
    expected = load(tmp_path, rows, **GRADED)
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        config = PromptsConfig(kind="file", path=str(path), held_out=0.3, **GRADED)
        place = f"{path} row 19, item 1 of 'b'"
    else:
        config = PromptsConfig(kind="hub", name=str(tmp_path), held_out=0.3, **GRADED)
        place = f"{tmp_path}/rows.jsonl:20, item 1 of 'b'"
    found = load_prompts(config)
    columns = ["prompt_id", "sample_index", "text", "label", "pair", "reward"]
    assert found.offline.num_rows == 47
    assert found.offline.select(columns).equals(expected.offline.select(columns))
    assert found.offline["source"][46].as_py() == place
    assert found.counts == expected.counts


#: Few texts and few prompts, so that rows often meet; a reward is a function of both.
completions = st.lists(st.sampled_from("abcdefgh"), max_size=3)
rows_of = st.lists(st.tuples(st.integers(0, 4), completions), max_size=12)


def graded_rows(drawn):
    return [
        {"prompt": f"Question {n}?", "a": [good(text, (n + ord(text)) % 3) for text in texts], "b": None}
        for n, texts in drawn
    ]


def identities(table):
    names = ("prompt_id", "sample_index", "text", "reward")
    return Counter(zip(*(table[name].to_pylist() for name in names), strict=True))


@settings(max_examples=40, deadline=None)
@given(drawn=rows_of, inserted=rows_of, seed=st.randoms(use_true_random=False))
def test_identities_do_not_depend_on_other_rows(tmp_path_factory, drawn, inserted, seed):
    folder = tmp_path_factory.mktemp("rows")
    before = identities(load(folder, graded_rows(drawn) + others(), **GRADED).offline)
    rows = graded_rows(drawn + inserted) + others()
    seed.shuffle(rows)
    after = identities(load(folder, rows, **GRADED).offline)
    kept = {
        (hashing.prompt_id([{"role": "user", "content": f"Question {n}?"}]), text)
        for n, texts in drawn
        for text in texts
    }
    assert set(before) == {row for row in after if (row[0], row[2]) in kept}
    assert max(after.values(), default=1) == 1


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=9))
def test_identities_in_pairs(tmp_path_factory, pairs):
    """Shuffled pairs keep their texts' numbers, and every pair stays one chosen and one rejected row."""
    rows = [{"prompt": "Question 0?", "c": chosen, "r": rejected} for chosen, rejected in pairs]
    rows += [{"prompt": f"Other {n}?", "c": None, "r": None} for n in range(12)]
    fields = {"chosen_field": "c", "rejected_field": "r"}
    first = load(tmp_path_factory.mktemp("rows"), rows, **fields)
    random.Random(0).shuffle(rows)
    second = load(tmp_path_factory.mktemp("rows"), rows, **fields)
    for found in (first, second):
        table = found.offline.to_pylist()
        assert all(row["sample_index"] == hashing.completion_index(row["text"]) for row in table)
        sides = {(row["pair"], row["label"]): row["text"] for row in table}
        numbers = range(len(set(pairs)))
        assert {(sides[n, "chosen"], sides[n, "rejected"]) for n in numbers} == set(pairs)
        assert len(table) == len(sides) == 2 * len(numbers)
        assert found.counts.get("repeated_pairs", 0) == len(pairs) - len(set(pairs))
        assert found.counts.get("equal_pairs", 0) == sum(a == b for a, b in pairs)
        assert all(row["reward"] is None for row in table)


def test_the_number_of_a_text():
    """Stores hold rows under these numbers: a change orphans them."""
    assert hashing.completion_index("Grüß Gott") == 1161479373
    assert hashing.completion_index("") != hashing.completion_index(" ")
    numbers = [hashing.completion_index(str(n)) for n in range(2000)]
    assert len(set(numbers)) == 2000
    assert 0 <= min(numbers) < 2**22 < 2**31 - 2**22 < max(numbers) < 2**31


#: Two texts with one number, found among 65,000.
FIRST, SECOND = "twin 53212", "twin 64865"


@pytest.mark.parametrize(
    ("rows", "fields", "places"),
    [
        ([one(good(FIRST)), one(good(SECOND))], GRADED, ("{}:1, 'a'", "{}:2, 'a'")),
        (
            [
                {"prompt": "Question 0?", "a": FIRST, "b": "x"},
                {"prompt": "Question 0?", "a": "y", "b": SECOND},
            ],
            {"chosen_field": "a", "rejected_field": "b"},
            ("{}:1", "{}:2"),
        ),
    ],
)
def test_two_texts_with_one_number_are_refused_with_both_rows(tmp_path, rows, fields, places):
    assert hashing.completion_index(FIRST) == hashing.completion_index(SECOND)
    with pytest.raises(DataError) as caught:
        load(tmp_path, [*rows, *others()], **fields)
    first, second = (place.format(tmp_path / "rows.jsonl") for place in places)
    number = hashing.completion_index(FIRST)
    assert str(caught.value) == (
        f"two completions of one prompt have the same number {number}; the other is that of {first} "
        f"[{second}]: change one of the two texts by a character, or leave it out"
    )
    apart = [row | {"prompt": f"{n}?"} for n, row in enumerate(rows)]
    indices = load(tmp_path, [*apart, *others()], **fields).offline["sample_index"].to_pylist()
    assert indices.count(number) == 2


@pytest.mark.skipif(not GSM8K.is_file(), reason="no shared/data/gsm8k/model_solutions_400.jsonl")
def test_graded_model_solutions_of_gsm8k():
    """Real graded completions: counts and shares from the raw file, and those that it is known to have."""
    columns = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    found = load_prompts(
        PromptsConfig(
            kind="file",
            path=str(GSM8K),
            prompt_field="question",
            ground_truth_field="ground_truth",
            completion_fields=columns,
            completion_text_field="solution",
            completion_reward_field="is_correct",
        )
    )
    raw = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    correct = {column: sum(row[column]["is_correct"] for row in raw) for column in columns}
    assert correct == dict(zip(columns, (89, 156, 146, 224), strict=True))
    assert found.counts["prompts"] == len(raw) == 400
    # 1,600 solutions; two models wrote the same one for one question.
    assert found.counts["repeated_completions"] == 1
    assert found.offline.num_rows == 1599
    absent = {"merged": 0, "filtered": 0, "empty_completions": 0, "ungraded_completions": 0}
    assert {name: found.counts.get(name, 0) for name in absent} == absent
    prompts = {
        row["question"]: hashing.prompt_id([{"role": "user", "content": row["question"]}]) for row in raw
    }
    graded = {
        (prompts[row["question"]], row[column]["solution"]): float(row[column]["is_correct"])
        for row in raw
        for column in columns
    }
    names = ("prompt_id", "text", "reward")
    table = zip(*(found.offline[name].to_pylist() for name in names), strict=True)
    assert {(prompt, text): reward for prompt, text, reward in table} == graded
    # Of the column that a merged completion came second in, its row is not counted again.
    sources = zip(found.offline["source"].to_pylist(), found.offline["reward"].to_pylist(), strict=True)
    shares = Counter(source.rsplit("'", 2)[1] for source, reward in sources if reward == 1.0)
    missing = {column: correct[column] - shares[column] for column in columns}
    assert sum(missing.values()) == sum(correct.values()) - sum(graded.values())
    assert sorted(missing.values())[:3] == [0, 0, 0]
