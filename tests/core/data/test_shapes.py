"""Rows of well-known data sets, loaded by the configuration in docs/how-to/bring-your-own-data.md."""

import json
import re
from pathlib import Path

import pytest
import yaml

from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts

DOCS = Path(__file__).parents[3] / "docs" / "how-to" / "bring-your-own-data.md"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


STEER = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
PAIR = {"chosen": [user("Q{n}"), assistant("good")], "rejected": [user("Q{n}"), assistant("bad")]}
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Q{n}\n\nAssistant:"
TALK = [user("Hi"), assistant("Hello."), user("Q{n}")]

#: Of every data set: a row ({n} is its number), its prompt, [(completion, label, reward)], its ground truth.
ASK = [user("Q{n}")]
LABELLED = [("good", "chosen", None), ("bad", "rejected", None)]
SETS = {
    "HelpSteer2": ({"prompt": "Q{n}", "response": "a", **STEER}, ASK, [("a", "", 3.0)], None),
    "HelpSteer2, weighted": (
        {"prompt": "Q{n}", "response": "a", **STEER},
        ASK,
        [("a", "", pytest.approx(0.65 * 3 + 0.8 * 4 + 0.45 * 4 + 0.55 * 2 - 0.4))],
        None,
    ),
    "HelpSteer3": (
        {"context": TALK, "response1": "a", "response2": "b", "overall_preference": -2},
        TALK,
        [("a", "", 2.0), ("b", "", -2.0)],
        None,
    ),
    "KTO mix": (
        {"prompt": ASK, "completion": [assistant("a")], "label": True},
        ASK,
        [("a", "", 1.0)],
        None,
    ),
    "BeaverTails": ({"prompt": "Q{n}", "response": "a", "is_safe": False}, ASK, [("a", "", 0.0)], None),
    "PKU-SafeRLHF": (
        {
            "prompt": "Q{n}",
            "response_0": "a",
            "response_1": "b",
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        },
        ASK,
        [("a", "", 1.0), ("b", "", 0.0)],
        None,
    ),
    "UltraFeedback": (
        {
            "instruction": "Q{n}",
            "completions": [
                {"response": "a", "annotations": {"helpfulness": {"Rating": "4", "Rationale": "x"}}},
                {"response": "b", "annotations": {"helpfulness": {"Rating": "N/A", "Rationale": "x"}}},
            ],
        },
        ASK,
        [("a", "", 4.0), ("b", "", None)],
        None,
    ),
    "UltraFeedback binarized": (
        {"prompt": "Q{n}", **PAIR, "messages": PAIR["chosen"], "score_chosen": 8.0, "score_rejected": 4.5},
        ASK,
        [("good", "chosen", 8.0), ("bad", "rejected", 4.5)],
        None,
    ),
    "Skywork, Tulu 3, Magpie preferences": ({"source": "x", **PAIR}, ASK, LABELLED, None),
    "RewardBench": ({"prompt": "Q{n}", "chosen": "good", "rejected": "bad"}, ASK, LABELLED, None),
    "Orca DPO pairs": (
        {"system": "Be brief.", "question": "Q{n}", "chosen": "good", "rejected": "bad"},
        [{"role": "system", "content": "Be brief."}, *ASK],
        LABELLED,
        None,
    ),
    "distilabel Orca": (
        {"system": "", "input": "Q{n}", "generations": ["a", "b"], "rating": [9.0, 7.0]},
        ASK,
        [("a", "", 9.0), ("b", "", 7.0)],
        None,
    ),
    "ShareGPT pairs": (
        {"conversations": [human("Q{n}")], "chosen": gpt("good"), "rejected": gpt("bad")},
        ASK,
        LABELLED,
        None,
    ),
    "UltraInteract pairs": (
        {"trajectory": [{"from": "user", "value": "Q{n}"}], "chosen": "good", "rejected": "bad"},
        ASK,
        LABELLED,
        None,
    ),
    "HH-RLHF": ({"chosen": HUMAN + " good", "rejected": HUMAN + " bad"}, TALK, LABELLED, None),
    "RM-static": ({"prompt": HUMAN, "chosen": " good", "rejected": " bad"}, TALK, LABELLED, None),
    "Nectar": (
        {
            "prompt": "\n\nHuman: Q{n}\n\nAssistant: ",
            "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 7.0}],
        },
        ASK,
        [("a", "", -1.0), ("b", "", -7.0)],
        None,
    ),
    "OpenAssistant-Guanaco": (
        {"text": "### Human: Hi### Assistant: Hello.### Human: Q{n}\n### Assistant: a"},
        TALK,
        [("a", "", None)],
        None,
    ),
    "SHP": (
        {"history": "Q{n}", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 5},
        ASK,
        [("a", "", 9.0), ("b", "", 5.0)],
        None,
    ),
    "WebGPT comparisons": (
        {
            "question": {"full_text": "Q{n}", "id": "x"},
            "answer_0": "a",
            "score_0": -0.5,
            "answer_1": "b",
            "score_1": 0.5,
        },
        ASK,
        [("a", "", -0.5), ("b", "", 0.5)],
        None,
    ),
    "Stack Exchange preferences": (
        {"question": "Q{n}", "answers": [{"text": "a", "pm_score": 3}, {"text": "b", "pm_score": 0}]},
        ASK,
        [("a", "", 3.0), ("b", "", 0.0)],
        None,
    ),
    "ELI5": (
        {"title": "Q{n}", "answers": {"text": ["a", "b"], "score": [6, 2]}},
        ASK,
        [("a", "", 6.0), ("b", "", 2.0)],
        None,
    ),
    "LMSYS human preference": (
        {
            "prompt": '["Q{n}"]',
            "response_a": '["a"]',
            "response_b": '["b"]',
            "winner_model_a": 0,
            "winner_model_b": 1,
        },
        ASK,
        [("a", "", 0.0), ("b", "", 1.0)],
        None,
    ),
    "OpenR1-Math": (
        {
            "problem": "Q{n}",
            "answer": "4",
            "generations": ["a", "b"],
            "correctness_math_verify": [True, False],
        },
        ASK,
        [("a", "", 1.0), ("b", "", 0.0)],
        "4",
    ),
    "Magpie, ShareGPT conversations": (
        {"conversations": [human("Q{n}"), gpt("a")]},
        ASK,
        [("a", "", None)],
        None,
    ),
    "GSM8K": ({"question": "Q{n}", "answer": "2 + 2 = 4\n#### 4"}, ASK, [], "2 + 2 = 4\n#### 4"),
    "MATH-500, NuminaMath": ({"problem": "Q{n}", "answer": "\\frac12"}, ASK, [], "\\frac12"),
    "PRM800K questions": (
        {"question": {"problem": "Q{n}", "ground_truth_answer": "4"}, "label": {"steps": []}},
        ASK,
        [],
        "4",
    ),
    "MBPP": (
        {"text": "Q{n}", "test_list": ["assert f(1)"], "test_setup_code": "", "code": "x"},
        ASK,
        [],
        {"test_list": ["assert f(1)"], "test_setup_code": ""},
    ),
    "HumanEval": (
        {"prompt": "Q{n}", "entry_point": "f", "test": "def check(f): ..."},
        ASK,
        [],
        {"prompt": "Q{n}", "entry_point": "f", "test": "def check(f): ..."},
    ),
    "LeetCodeDataset": (
        {"query": "Q{n}", "prompt": "import math", "entry_point": "f", "test": "def check(f): ..."},
        ASK,
        [],
        {"prompt": "import math", "entry_point": "f", "test": "def check(f): ..."},
    ),
    "CodeContests": (
        {"description": "Q{n}", "public_tests": {"input": ["1"], "output": ["2"]}},
        ASK,
        [],
        {"input": ["1"], "output": ["2"]},
    ),
    "IFEval": (
        {"prompt": "Q{n}", "instruction_id_list": ["no_comma"], "kwargs": [{"n": 1}]},
        ASK,
        [],
        {"instruction_id_list": ["no_comma"], "kwargs": [{"n": 1}]},
    ),
}


def documented():
    """{data set: its configuration} of the table in docs/how-to/bring-your-own-data.md."""
    part = DOCS.read_text(encoding="utf-8").split("\n## Data sets by name\n")[1]
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \|$", part, re.M)
    return {name: yaml.safe_load("{" + text + "}") for name, text in rows}


CONFIGURATIONS = documented()


def filled(value, n):
    """A row's value with {n} filled in."""
    return json.loads(json.dumps(value).replace("{n}", str(n)))


def test_every_documented_data_set_is_tried():
    assert CONFIGURATIONS.keys() == SETS.keys()


@pytest.mark.parametrize("packing", ["lines", "array", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_a_data_set_loads_as_documented(tmp_path, name, packing):
    row, prompt, completions, ground_truth = SETS[name]
    rows = [filled(row, n) for n in range(8)]
    path = tmp_path / {"lines": "rows.jsonl", "array": "rows.json", "parquet": "rows.parquet"}[packing]
    if packing == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows) if packing == "lines" else json.dumps(rows)
        path.write_text(text)
    config = PromptsConfig(kind="file", path=str(path), held_out=0.5, **CONFIGURATIONS[name])
    found = load_prompts(config)
    assert found.prompts["messages"].to_pylist() == [filled(prompt, n) for n in range(8)]
    if ground_truth is not None:
        assert json.loads(found.prompts["ground_truth"][3].as_py()) == filled(ground_truth, 3)
    columns = (found.offline[column].to_pylist() for column in ("text", "label", "reward"))
    assert list(zip(*columns, strict=True)) == completions * 8


def refused(tmp_path, row, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_prompts(PromptsConfig(kind="file", path=str(path), **fields))
    assert caught.value.where == f"{path}:1"
    return caught.value.message


@pytest.mark.parametrize(
    ("row", "fields", "says"),
    [
        (
            {"prompt": "Q", "conversation_a": [user("Q"), assistant("a")], "winner": "model_a"},
            {"completion_fields": ["conversation_a"], "completion_reward_field": "winner"},
            "'winner' is 'model_a', not a number",
        ),
        (
            {"info": {"post": "Q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
            {
                "prompt_field": "info.post",
                "completion_fields": ["summaries"],
                "completion_reward_field": "choice",
            },
            "item 0 of 'summaries' is one of 2 completions, and their grades 'choice' are an integer",
        ),
        (
            {
                "chosen": [*TALK, assistant("a")],
                "rejected": [user("Hi"), assistant("Hey."), ASK[0], gpt("b")],
            },
            {"chosen_field": "chosen", "rejected_field": "rejected"},
            "'chosen' and 'rejected' differ before their last message",
        ),
        (
            {"prompt": '["Q", "and?"]', "chosen": "a", "rejected": "b"},
            {"chosen_field": "chosen", "rejected_field": "rejected", "string_format": "json"},
            "'prompt' is 2 strings written as a JSON list",
        ),
        ({"message_id": "1", "parent_id": None, "text": "Q", "role": "prompter"}, {}, "no field 'prompt'"),
        ({"prompt": ["Q", "and?"]}, {}, "'prompt', message 0, is a string"),
    ],
)
def test_a_form_that_would_have_to_be_guessed_is_refused(tmp_path, row, fields, says):
    assert refused(tmp_path, row, **fields) == says
