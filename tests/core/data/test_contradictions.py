"""Rows that contradict another one: told together with unreadable ones, or left out and counted."""

import json

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts

GOOD = [{"prompt": f"Question {n}?", "ref": n, "a": f"answer {n}", "g": n} for n in range(12)]
#: By line of the file: what is wrong with the row.
BAD = {
    13: (GOOD[3] | {"ref": 4}, "the prompt of {path}:4 stands here with another ground truth"),
    14: (GOOD[3] | {"g": 5}, "stands in 'a' with the reward 5.0, there with 3.0"),
    15: (GOOD[5] | {"a": ["x", "y", "x"], "g": [1, 2, 3]}, "stands in item 2 of 'a' with the reward 3.0"),
    16: ({"prompt": 3, "ref": 1, "a": "x", "g": 1}, "'prompt' is an integer"),
    17: (GOOD[0] | {"g": "good"}, "'g' is 'good', not a number"),
    18: ({"prompt": "\ud800", "ref": 1, "a": "x", "g": 1}, "half of a surrogate pair"),
}


def load(tmp_path, on_unusable, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"ground_truth_field": "ref", "completion_fields": ("a",), "completion_reward_field": "g"}
    return path, load_prompts(PromptsConfig(kind="file", path=str(path), on_unusable=on_unusable, **fields))


def test_all_of_them_are_told_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        load(tmp_path, "refuse", [*GOOD, *(row for row, _ in BAD.values())])
    head, *lines = str(caught.value).splitlines()
    assert "6 rows cannot be used (4 that contradict another row, 2 that cannot be read)" in head
    path = tmp_path / "rows.jsonl"
    told = {int(line.split(":")[1]): line for line in lines}
    assert told.keys() == BAD.keys()
    for number, (_, says) in BAD.items():
        assert says.format(path=path) in told[number]


def test_left_out_they_leave_the_others_as_they_are(tmp_path):
    _, alone = load(tmp_path, "refuse", GOOD)
    _, found = load(tmp_path, "skip", [*GOOD, *(row for row, _ in BAD.values())])
    assert found.prompts.equals(alone.prompts)
    assert found.offline.equals(alone.offline)
    assert found.counts == alone.counts | {"unreadable_rows": 2, "contradicting_rows": 4}


def test_rows_that_agree_are_no_contradiction(tmp_path):
    again = [GOOD[3], GOOD[3] | {"a": "another", "g": 0}]
    _, found = load(tmp_path, "refuse", [*GOOD, *again])
    assert found.counts["merged"] == 2
    assert found.counts["repeated_completions"] == 1
    assert found.offline.num_rows == 13
