"""What becomes of completions that cannot be scored: a status in the table, a count in the report."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.result import report_path
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.row_steps import RewardStep
from qrpo_core.pipeline.workspace import Workspace
from tests.core.rewards.judge_server import Judge, Reply, said

pytestmark = pytest.mark.slow

PROMPTS = 8

#: A line of the report's table of what was left out: what, count, why.
LEFT_OUT = re.compile(r'<th scope="row">([^<]*)</th><td class="count">([^<]*)</td><td>([^<]*)</td>')


def experiment(
    model: Path, folder: Path, answers: list[str], reward: dict[str, Any], **columns: Any
) -> Experiment:
    """Every prompt has the same completions of the data set's own, ranked among each other."""
    rows = [{"prompt": f"Task {n}", "answers": answers, **columns} for n in range(PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_experiment(
        {
            "name": "statuses",
            "model": {"path": str(model), "dtype": "float32"},
            "prompts": {
                "kind": "file",
                "path": str(folder / "rows.jsonl"),
                "completion_fields": ["answers"],
                "held_out": 0.3,
                **({"ground_truth_fields": list(columns)} if columns else {}),
            },
            "sampling": {"engine": "fake", "max_new_tokens": 4},
            "reward": reward,
            "training_data": {"mode": "offline", "references": "offline", "min_scored": 0.3},
            "training": {"precision": "fp32", "batch_size": 16},
            "evaluation": {"samples_per_prompt": 1, "resamples": 100},
            "store": {"path": str(folder / "store")},
        }
    )


def check(wanted: Experiment, expected: dict[str, int]) -> None:
    """Run everything; each prompt's completions have the statuses expected, in the table and in the report.

    expected : completions of a prompt by status.
    """
    from flows.align import align

    align(wanted)
    workspace = Workspace(wanted)
    rewards = stored_steps(workspace).first.rewards
    assert isinstance(rewards, RewardStep)
    table = rewards.read()
    prompts = len(set(table["prompt_id"].to_pylist()))
    assert prompts >= 3
    found = Counter(table["status"].to_pylist())
    assert found == {status: prompts * count for status, count in expected.items()}
    for row in table.to_pylist():
        assert (row["reward"] is None) == (row["status"] != "ok")
        assert row["detail"] or row["status"] == "ok"
    lines = LEFT_OUT.findall(report_path(workspace).read_text(encoding="utf-8"))
    assert sorted(line for line in lines if "with status" in line[0]) == [
        (f"training completions with status {status}", f"{prompts * count:,}", "not in any quantile")
        for status, count in sorted(expected.items())
        if status != "ok"
    ]


def program(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


@pytest.mark.long
def test_programs_that_are_ended_and_tests_that_cannot_be_asked(
    server: PrefectServer, long_model: Path, tmp_path: Path
) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    answers = [
        program("def add(a, b):", "    return a + b"),
        program("def add(a, b):", "    return a - b"),
        program("def add(a, b):", "    return b + a if b else 0"),
        program("while True: pass"),
    ]
    reward = {"kind": "code", "code": {"format": "mbpp", "seconds_per_test": 1.0}}
    tests = ["assert add(1, 2) == 3", "assert add(1, 0) == 1"]
    check(experiment(long_model, tmp_path, answers, reward, test_list=tests), {"ok": 3, "timeout": 1})


@pytest.mark.long
def test_a_harness_that_fails_gives_no_score(server: PrefectServer, long_model: Path, tmp_path: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    half = program("def one():", "    return 1")
    both = program("def one():", "    return 1", "def apply(f, x):", "    return x + 1", "two = one")
    reward = {"kind": "code", "code": {"format": "mbpp", "seconds_per_test": 1.0}}
    # What the test passes cannot be sent to another process; a text without a program asks for nothing.
    answers = [both, half, "No program."]
    columns = {"test_list": ["assert one() == 1", "assert apply(lambda x: x + 1, two()) == 2"]}
    check(experiment(long_model, tmp_path, answers, reward, **columns), {"ok": 2, "sandbox_error": 1})


@pytest.mark.long
def test_rows_too_long_for_a_reward_model(server: PrefectServer, long_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(long_model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128, **sizes)
    config.pad_token_id = tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    reward = {"kind": "model", "model": {"path": str(tmp_path / "classifier"), "dtype": "float32"}}
    answers = ["yes", "no", "a rather long answer " * 10]
    check(experiment(long_model, tmp_path, answers, reward), {"ok": 2, "too_long": 1})


@pytest.fixture
def service() -> Iterator[str]:
    """A judge that gives a digit for short texts, prose for "prose", and is out of order for "broken"."""

    def answer(body: dict[str, Any], _: int) -> Reply:
        text = body["messages"][-1]["content"]
        if "broken" in text:
            return 503, {}, {"error": {"message": "out of order"}}
        return said("I would rather not say." if "prose" in text else str(1 + len(text) % 9))

    with Judge(answer).running() as judge:
        yield judge.url


def test_judges_that_do_not_answer_or_not_with_a_score(
    server: PrefectServer, long_model: Path, tmp_path: Path, service: str
) -> None:
    judge = {
        "url": service,
        "model": "judge",
        "template": "Rate: {{ completion }}",
        "expected": False,
        "retry_seconds": 1.0,
    }
    answers = ["one", "three", "prose", "broken", "broken too"]
    wanted = experiment(long_model, tmp_path, answers, {"kind": "judge", "judge": judge})
    check(wanted, {"ok": 2, "parse_error": 1, "endpoint_error": 2})
