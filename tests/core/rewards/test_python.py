"""The reward `python`: what the user's function gets, may return, and what names it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import PythonRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.python.reward import PythonReward
from qrpo_core.rewards.registry import check_ground_truths, make_reward, reward_identity

Write = Callable[[str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the module `mine` into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(text)

    return write


def row(text: str, index: int = 0, ground_truth: str | None = None) -> RewardRequest:
    return RewardRequest("p", index, (("system", "S"), ("user", "Q?")), text, ground_truth)


def reward(function: str = "mine:score", **settings: Any) -> PythonReward:
    return PythonReward(PythonRewardConfig(function=function, **settings))


def test_the_function_gets_everything_that_is_known_of_a_row(write: Write) -> None:
    write(
        "seen = []\ndef score(batch, *, scale):\n    seen.extend(batch)\n"
        "    return [scale * len(r.completion) for r in batch]\n"
    )
    made = reward(arguments={"scale": 0.5})
    assert made.score([row("abc", 4, '{"a": [1, 2.5]}'), row("", 5)]) == [Score(1.5), Score(0.0)]
    first, second = sys.modules["mine"].seen
    assert first.messages == ({"role": "system", "content": "S"}, {"role": "user", "content": "Q?"})
    assert (first.prompt, first.completion, first.prompt_id, first.sample_index) == ("Q?", "abc", "p", 4)
    assert first.ground_truth == {"a": [1, 2.5]}
    assert second.ground_truth is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.completion = "x"


def test_batches_and_progress(write: Write) -> None:
    write(
        "sizes = []\ndef score(batch):\n    sizes.append(len(batch))\n"
        "    return [r.sample_index for r in batch]\n"
    )
    calls: list[int] = []
    found = reward(batch_size=3).score([row("a", i) for i in range(8)], calls.append)
    assert [score.reward for score in found] == list(range(8))
    assert sys.modules["mine"].sizes == calls == [3, 3, 2]


def test_what_an_element_may_be(write: Write) -> None:
    write(
        "import numpy as np\n"
        "VALUES = [1, True, 0.5, np.float32(0.25), np.array(2.0), None, (None, 'no\\nanswer'), float('nan'), "
        "'0.5', 'x', [1, 2], np.array([[3.0]]), np.array([1, 2])]\n"
        "def score(batch): return [VALUES[r.sample_index] for r in batch]\n"
    )
    found = reward().score([row("", i) for i in range(13)])
    assert found.pop(11).reward == 3.0
    assert [score.reward for score in found[:5]] == [1.0, 1.0, 0.5, 0.25, 2.0]
    assert all(type(score.reward) is float for score in found[:5])
    assert {score.status for score in found[5:]} == {"parse_error"}
    details = [score.detail for score in found[5:]]
    assert details[:2] == ["the function gave no score", "the function gave no score: no answer"]
    assert "nan" in details[2]
    assert "the text '0.5'" in details[3]
    assert "TypeError" in details[5]


def test_an_array_is_a_list_of_scores(write: Write) -> None:
    write("import numpy as np\ndef score(batch): return np.array([r.sample_index / 2 for r in batch])\n")
    assert [score.reward for score in reward().score([row("", i) for i in range(3)])] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("[1]", "1 scores for 2 rows"),
        ("[1, 2, 3]", "3 scores for 2 rows"),
        ("1.0", "a float for 2 rows"),
        ("None", "a NoneType for 2 rows"),
        ("'ab'", "a str for 2 rows"),
        ("{0: 1, 1: 2}", "a dict for 2 rows"),
        ("(1 for _ in batch)", "a generator for 2 rows"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(write: Write, expression: str, message: str) -> None:
    write(f"def score(batch): return {expression}\n")
    with pytest.raises(DataError, match=f"{message} .*mine:score"):
        reward().score([row("a"), row("b")])


def test_only_the_row_that_raises_has_no_score(write: Write) -> None:
    write("def score(batch): return [1 / len(r.completion) for r in batch]\n")
    found = reward().score([row("a"), row(""), row("ab")])
    assert [score.reward for score in found] == [1.0, None, 0.5]
    assert found[1] == Score(None, "parse_error", "ZeroDivisionError: division by zero")


def test_an_interrupt_is_not_an_exception_of_a_row(write: Write) -> None:
    write("def score(batch): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        reward().score([row("a")])


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("x = 1", "mine:score", "'score' does not exist in module 'mine'"),
        ("score = 1", "mine:score", "'score' is not a function"),
        ("import no_such_thing", "mine:score", "cannot be imported .*no_such_thing"),
        ("1 / 0", "mine:score", "cannot be imported .*ZeroDivisionError"),
        ("x = 1", "not_mine:score", "'not_mine' cannot be imported .*not found"),
        ("x = 1", "not_mine.at_all:score", "cannot be imported .*No module named 'not_mine'"),
        ("x = 1", "sys:exit", "'sys' has no file"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(
    write: Write, text: str, function: str, message: str
) -> None:
    write(text)
    config = RewardConfig(kind="python", python={"function": function})
    with pytest.raises(ConfigError, match=message):
        check_ground_truths(config, [])
    weighted = RewardConfig(kind="weighted", terms=[{"weight": 1.0, "reward": config}])
    with pytest.raises(ConfigError, match=message):
        check_ground_truths(weighted, [])


def test_the_identity_is_the_file_the_name_the_version_and_the_arguments(write: Write) -> None:
    def identity(**settings: Any) -> dict[str, Any]:
        section = {"function": "mine:score", **settings}
        return reward_identity(RewardConfig(kind="python", python=section))

    write("raise SystemExit('naming it does not run it')")
    first = identity()
    assert identity() == first
    assert identity(batch_size=7) == first
    others = [identity(version="2"), identity(arguments={"a": 1}), identity(function="mine:other")]
    write("def score(batch): return [0.0] * len(batch)")
    others.append(identity())
    assert all(other != first for other in others)


def test_a_file_edited_behind_its_import_is_refused(write: Write) -> None:
    write("def score(batch): return [0.0] * len(batch)\n")
    made = make_reward(RewardConfig(kind="python", python={"function": "mine:score"}))
    made.score([row("a")])
    write("def score(batch): return [1.0] * len(batch)\n")
    with pytest.raises(ConfigError, match="edited after"):
        made.score([row("a")])


def test_the_working_directory_is_importable_once(write: Write, tmp_path: Path) -> None:
    write("def score(batch): return [math for math in [0.0] * len(batch)]\n")
    for _ in range(3):
        reward().problems([])
    assert sys.path.count(str(tmp_path)) == 1
    assert math.isfinite(reward().score([row("a")])[0].reward or 0.0)


def test_a_function_that_fails_on_every_row_names_its_own_error_and_line(write: Write) -> None:
    write("def score(batch):\n    raise KeyError('answer')\n")
    with pytest.raises(ConfigError, match=r"each of the first 3 rows: KeyError: 'answer' .*mine\.py:2"):
        reward().score([row("a", index) for index in range(3)])


def test_a_wrong_signature_is_a_functions_own_error(write: Write) -> None:
    write("def score(prompts, completions): return [1.0] * len(completions)\n")
    with pytest.raises(
        ConfigError, match=r"TypeError: score\(\) missing 1 required positional argument"
    ) as caught:
        reward().score([row("a", index) for index in range(2)])
    assert caught.value.where == "reward.python.function 'mine:score'"


def test_leaving_the_process_is_a_failure_of_the_row(write: Write) -> None:
    write("import sys\ndef score(batch): return [1.0 if r.completion else sys.exit(3) for r in batch]\n")
    found = reward().score([row("a"), row("")])
    assert (found[0].reward, found[1].status) == (1.0, "parse_error")
    assert "SystemExit" in found[1].detail


def test_once_it_has_scored_rows_that_fail_have_their_status(write: Write) -> None:
    write("def score(batch): return [1 / len(r.completion) for r in batch]\n")
    made = reward()
    assert made.score([row("a"), row("")])[1].status == "parse_error"
    assert [score.status for score in made.score([row(""), row("", 1)])] == ["parse_error"] * 2
    assert [score.status for score in reward().score([row("")])] == ["parse_error"]  # one row proves nothing
