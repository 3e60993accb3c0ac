"""Merging, limits, splits and the tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import OFFLINE, PROMPTS
from qrpo_core.config import PromptsConfig
from qrpo_core.config.reading import load_experiment
from qrpo_core.data.sources import load_prompts, source_identity

EXPERIMENTS = Path(__file__).resolve().parents[3] / "experiments"


def load(folder, rows, **fields):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(PromptsConfig(kind="file", path=str(path), **fields))


def numbered(count):
    return [{"prompt": f"Question {number}?"} for number in range(count)]


def test_tables_have_their_schemas(tmp_path):
    found = load(tmp_path, numbered(20))
    assert found.prompts.schema.equals(PROMPTS, check_metadata=True)
    assert found.offline.schema.equals(OFFLINE, check_metadata=True)
    assert found.offline.num_rows == 0
    row = found.prompts.to_pylist()[4]
    messages = [{"role": "user", "content": "Question 4?"}]
    assert row["prompt_id"] == hashing.prompt_id(messages)
    assert row["messages"] == messages
    assert row["ground_truth"] is None
    assert row["ground_truth_digest"] == ""
    assert row["source"] == f"{tmp_path / 'rows.jsonl'}:5"


def test_the_split_is_decided_by_the_prompt_alone(tmp_path):
    found = load(tmp_path, numbered(40), held_out=0.3).prompts.to_pylist()
    for row in found:
        held_out = hashing.split_fraction(row["prompt_id"]) < 0.3
        assert row["split"] == ("held_out" if held_out else "train")
    more = load(tmp_path, [*numbered(60)[30:], *numbered(30)], held_out=0.3).prompts.to_pylist()
    sides = {row["prompt_id"]: row["split"] for row in more}
    assert all(sides[row["prompt_id"]] == row["split"] for row in found)


def test_ground_truth_and_its_digest(tmp_path):
    rows = [row | {"answer": {"b": number, "a": "ü"}} for number, row in enumerate(numbered(20))]
    row = load(tmp_path, rows, ground_truth_field="answer").prompts.to_pylist()[2]
    assert row["ground_truth"] == '{"a":"ü","b":2}'
    assert row["ground_truth_digest"] == hashing.digest_json({"a": "ü", "b": 2})


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    limit=st.none() | st.integers(1, 40),
)
def test_every_row_is_accounted_for(tmp_path_factory, numbers, limit):
    rows = [*numbered(8), *({"prompt": f"Question {number}?"} for number in numbers)]
    limit = limit and limit + 8
    found = load(tmp_path_factory.mktemp("rows"), rows, limit=limit, held_out=0.3)
    counts = found.counts
    first = list(dict.fromkeys(row["prompt"] for row in rows))
    assert [row[0]["content"] for row in found.prompts["messages"].to_pylist()] == first[:limit]
    assert counts["read"] == len(rows) == counts["prompts"] + counts["merged"] + counts["filtered"]
    assert counts["merged"] == len(rows) - len(first)
    assert counts["prompts"] == found.prompts.num_rows == counts["train"] + counts["held_out"]


def test_unequal_ground_truths_are_refused_with_both_rows(tmp_path):
    rows = [row | {"a": 1} for row in numbered(3)]
    clash = {"prompt": [{"role": "user", "content": "Question 1?"}], "a": 2}
    with pytest.raises(DataError) as caught:
        load(tmp_path, [*rows, clash], ground_truth_field="a")
    path = tmp_path / "rows.jsonl"
    assert str(caught.value) == (
        f"the prompt of {path}:2 stands here with another ground truth [{path}:4]: keep one of the two rows"
    )
    with pytest.raises(DataError, match="with another ground truth"):
        load(tmp_path, [*rows, clash | {"a": None}], ground_truth_field="a")
    assert load(tmp_path, [*rows * 4, *numbered_answers(20)], ground_truth_field="a").counts["merged"] == 12


def numbered_answers(count):
    return [row | {"a": 1} for row in numbered(count)]


def test_system_turn(tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    found = load(tmp_path, [{"prompt": own}, *numbered(20)], system="Be kind.").prompts.to_pylist()
    assert found[0]["messages"] == own
    assert found[1]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Question 0?"},
    ]
    assert found[1]["prompt_id"] == hashing.prompt_id(found[1]["messages"])


def test_examples_stand_between_the_system_turn_and_the_prompt(tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    examples = [{"prompt": "One?", "completion": "1."}, {"prompt": "Two?", "completion": "2."}]
    shown = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2."},
    ]
    rows = [{"prompt": own}, *numbered(20)]
    found = load(tmp_path, rows, system="Be kind.", examples=examples).prompts["messages"].to_pylist()
    assert found[0] == [own[0], *shown, own[1]]
    first = {"role": "user", "content": "Question 0?"}
    assert found[1] == [{"role": "system", "content": "Be kind."}, *shown, first]
    bare = load(tmp_path, rows, examples=examples).prompts["messages"].to_pylist()
    assert bare[1] == [*shown, first]


def test_system_turn_can_make_prompts_equal(tmp_path):
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Question 0?"}]
    assert load(tmp_path, [*numbered(20), {"prompt": said}], system="Be kind.").counts["merged"] == 1


def test_offline_rows_keep_pairs_together(tmp_path):
    rows = [row | {"c": f"good {n}", "r": "bad"} for n, row in enumerate(numbered(20))]
    again = [rows[0] | {"c": "better"}, rows[0]]
    found = load(tmp_path, rows + again, chosen_field="c", rejected_field="r", limit=19, held_out=0.4)
    table = found.offline.to_pylist()
    kept = set(found.prompts["prompt_id"].to_pylist())
    assert {row["prompt_id"] for row in table} == kept
    first = found.prompts["prompt_id"][0].as_py()
    place = tmp_path / "rows.jsonl"
    names = ("pair", "text", "label", "source", "reward")
    assert [tuple(r[name] for name in names) for r in table if r["prompt_id"] == first] == [
        (0, "good 0", "chosen", f"{place}:1", None),
        (0, "bad", "rejected", f"{place}:1", None),
        (1, "better", "chosen", f"{place}:21", None),
        (1, "bad", "rejected", f"{place}:21", None),
    ]
    assert all(row["sample_index"] == hashing.completion_index(row["text"]) for row in table)
    assert found.counts["repeated_pairs"] == 1
    assert found.counts["merged"] == 2
    assert found.counts["filtered"] == 1


@pytest.mark.parametrize(
    ("rows", "held_out", "says"),
    [(1, 1e-9, "no prompt is held out: 1 prompts"), (3, 1 - 1e-9, "no prompt is left to train on")],
)
def test_one_sided_splits(tmp_path, rows, held_out, says):
    with pytest.raises(DataError, match=says) as caught:
        load(tmp_path, numbered(rows), held_out=held_out)
    assert "prompts.held_out or give more prompts" in caught.value.remedy


@pytest.mark.parametrize("name", ["demo", "arithmetic"])
def test_shipped_experiments(name):
    config = load_experiment(EXPERIMENTS / f"{name}.yaml").prompts
    found = load_prompts(config)
    assert found.prompts.num_rows == config.size
    assert found.counts["held_out"] >= 100
    larger = load_experiment(EXPERIMENTS / f"{name}.yaml", [f"prompts.size={config.size + 10}"]).prompts
    assert load_prompts(larger).prompts.slice(0, config.size).equals(found.prompts)


def test_identity_imports_no_heavy_library(tmp_path):
    """A run that finds everything in the store asks for the identity only."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    code = f"""
import sys
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import source_identity
for config in (
    PromptsConfig(kind="template", templates=("a",), size=1),
    PromptsConfig(kind="reasoning_gym", task="chain_sum", size=1),
    PromptsConfig(kind="file", path={str(tmp_path / "rows.jsonl")!r}),
    PromptsConfig(kind="hub", name={str(tmp_path)!r}),
):
    print(source_identity(config))
heavy = ("torch", "datasets", "reasoning_gym", "transformers", "scipy")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_identity_of_drawn_prompts():
    template = PromptsConfig(kind="template", templates=("a", "b"), size=2)
    assert source_identity(template) == {}
    task = PromptsConfig(kind="reasoning_gym", task="chain_sum", size=2)
    assert set(source_identity(task)) == {"reasoning_gym"}
