"""The reward `alpaca_eval`: the package's own question and reading, asked over a real connection."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError, EngineError
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.alpaca_eval import package
from qrpo_core.rewards.alpaca_eval.reward import baseline_output
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.registry import make_reward, reward_identity
from tests.core.rewards.alpaca_judge import PYTHON, needs_package, preferring
from tests.core.rewards.judge_server import Judge, said


def config(url: str = "http://127.0.0.1:9/v1", **settings: Any) -> RewardConfig:
    given = {"url": url, "model": "local", "retry_seconds": 0, "python": PYTHON, **settings}
    return RewardConfig.model_validate({"kind": "alpaca_eval", "alpaca_eval": given})


def rows(texts: Sequence[str], baseline: str = "a baseline") -> list[RewardRequest]:
    truth = json.dumps({"output": baseline, "generator": "gpt4"})
    return [
        RewardRequest(f"p{place}", 0, (("user", f"Question {place}"),), text, truth)
        for place, text in enumerate(texts)
    ]


@needs_package
def test_the_preference_is_for_the_completion_wherever_it_stands() -> None:
    # the judge gives our texts 0.8, first or second; the package switches the two by the instruction
    def share(first: str, second: str) -> float:
        return 0.2 if first == "a baseline" else 0.8

    texts = [f"ours {place}" for place in range(12)]
    with Judge(preferring(share)).running() as judge:
        scores = make_reward(config(judge.url)).score(rows(texts))
    assert [score.reward for score in scores] == pytest.approx([0.8] * 12)
    firsts = [str(body["messages"][-1]["content"]).index("ours") for *_, body in judge.asked]
    assert len(set(firsts)) > 1, "both orders occur"
    body = judge.asked[0][3]
    assert {name: body[name] for name in ("model", "max_tokens", "logprobs", "top_logprobs")} == {
        "model": "local",
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]


@needs_package
def test_rows_are_matched_by_row_and_equal_texts_are_a_draw() -> None:
    texts = ["one", "a baseline", "three three", "", "five " * 5]
    lengths = {text: 0.1 + 0.01 * len(text) for text in texts}

    def share(first: str, second: str) -> float:
        return lengths[first] if first != "a baseline" else 1 - lengths[second]

    with Judge(preferring(share)).running() as judge:
        scores = make_reward(config(judge.url)).score(rows(texts))
    wanted = [0.5 if text == "a baseline" else lengths[text] for text in texts]
    assert [score.reward for score in scores] == pytest.approx(wanted)
    assert len(judge.asked) == 4


@needs_package
def test_an_outage_and_an_unreadable_answer_are_statuses_of_their_rows() -> None:
    def answer(body: dict[str, Any], turn: int) -> Any:
        content = str(body["messages"][-1]["content"])
        if "away" in content:
            return 503, {}, "busy"
        if "vague" in content:
            top = [{"token": "Both", "logprob": -0.1}]
            return said("Both", tokens=[{**top[0], "top_logprobs": top}])
        return preferring(lambda first, second: 0.5)(body, turn)

    with Judge(answer).running() as judge:
        scores = make_reward(config(judge.url)).score(rows(["fine", "away", "vague"]))
    assert [score.status for score in scores] == ["ok", "endpoint_error", "parse_error"]
    assert scores[0] == Score(0.5)


@needs_package
def test_a_judge_without_log_probabilities_and_an_unknown_annotator_are_refused() -> None:
    with (
        Judge(lambda body, turn: said("m")).running() as judge,
        pytest.raises(EngineError, match="no log-probabilities"),
    ):
        make_reward(config(judge.url)).score(rows(["x"]))
    with pytest.raises(ConfigError, match="no annotator 'weighted_nothing'"):
        make_reward(config(annotator="weighted_nothing")).problems([])
    assert reward_identity(config())["identities"]["reward"]["alpaca-eval"][0].isdigit()


def test_a_missing_package_is_one_line_before_anything_is_asked(tmp_path: Path) -> None:
    import venv

    venv.create(tmp_path / "empty", with_pip=False)
    for use in (reward_identity, lambda each: make_reward(each).problems([])):
        with pytest.raises(ConfigError, match="needs the package alpaca-eval") as found:
            use(config(python=str(tmp_path / "empty")))
        assert "pip install 'qrpo[alpaca-eval]'" in str(found.value)
        assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match="not a working Python"):
        package.version(str(tmp_path / "nothing"))


def test_the_ground_truth_is_the_output_of_a_baseline() -> None:
    assert baseline_output('"text"') == "text"
    assert baseline_output('{"output": "text", "generator": "g"}') == "text"
    for other in ("3", '{"text": "x"}', "[]"):
        with pytest.raises(ValueError, match="has to be a text"):
            baseline_output(other)


@needs_package
def test_every_bad_ground_truth_is_found() -> None:
    reward = make_reward(config())
    found = reward.problems([("a", '"fine"'), ("b", None), ("c", "3")])
    assert [problem.row for problem in found] == [1, 2]
    with pytest.raises(DataError, match="no ground truth"):
        reward.score([RewardRequest("p", 0, (("user", "q"),), "x", None)])


def test_the_program_of_the_package_imports_nothing_of_this_project() -> None:
    from qrpo_core.rewards.alpaca_eval import worker_main

    text = Path(worker_main.__file__).read_text()
    assert "qrpo_core" not in text.split('"""', 2)[2]
    assert sys.version_info >= (3, 11)
