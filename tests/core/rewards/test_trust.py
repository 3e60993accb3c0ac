"""A reward is tried on constants, other prompts' answers and the right answer before a run."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest

from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import check_ground_truths, make_reward, reward_doubts
from qrpo_core.rewards.verifiable import scorer_process
from tests.core.rewards.code_problems import needs_bwrap


def problems(config: dict[str, Any], ground_truths: list[Any]) -> list[str]:
    pairs = [(f"p{row}", json.dumps(each)) for row, each in enumerate(ground_truths)]
    return [f"{place}: {doubt.problem}" for place, _, doubt in reward_doubts(RewardConfig(**config), pairs)]


def task(name: str, count: int = 8) -> list[dict[str, Any]]:
    import reasoning_gym

    parameters = {"size": count, "seed": 5}
    made = reasoning_gym.create_dataset(name, **parameters)
    return [{"task": name, "parameters": parameters, "entry": json.loads(json.dumps(each))} for each in made]


GYM = {"kind": "reasoning_gym"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("coin_flip", "constant answer '0'"),
        ("game_of_life_halting", "constant answer"),
        ("puzzle24", "another prompt's answer"),
    ],
)
def test_a_task_whose_scorer_pays_for_anything_is_named(name: str, says: str) -> None:
    (problem,) = problems(GYM, task(name))
    assert says in problem


@pytest.mark.parametrize("name", ["binary_matrix", "n_queens", "sudoku"])
def test_answers_of_several_lines_need_another_extraction_than_the_last_line(name: str) -> None:
    ground_truths = task(name)
    (problem,) = problems(GYM | {"extract": "last_line"}, ground_truths)
    assert "does not pay for the right answer of 8 of 8 prompts" in problem
    assert problems(GYM, ground_truths) == []  # the kind's own rule takes as many lines as the answer has
    assert problems(GYM | {"extract": "answer_tag"}, ground_truths) == []


def test_a_task_without_answers_is_doubted_but_may_be_meant() -> None:
    pairs = [(f"p{row}", json.dumps(each)) for row, each in enumerate(task("rubiks_cube", 4))]
    ((_, _, doubt),) = reward_doubts(RewardConfig(**GYM), pairs)
    assert "no answer of its own" in doubt.problem
    assert not doubt.severe


@pytest.mark.parametrize(
    "config",
    [{"kind": "number"}, {"kind": "number", "extract": "answer_tag"}, {"kind": "exact"}, {"kind": "math"}],
)
def test_an_ordinary_reward_is_trusted(config: dict[str, Any]) -> None:
    assert problems(config, [3, 12, "7", 0, 5, 1]) == []


def test_a_data_set_with_one_answer_for_all_teaches_that_answer() -> None:
    assert "constant answer 'yes'" in problems({"kind": "exact"}, ["yes"] * 6)[0]
    assert problems({"kind": "exact"}, ["yes"] * 5 + ["no"] * 3) == []
    assert problems({"kind": "exact"}, ["yes"] * 3) == []  # too few to say


def test_an_extraction_that_cannot_find_the_right_answer_is_named_with_its_term() -> None:
    terms = [{"weight": 1, "reward": {"kind": "sentiment"}}]
    terms.append({"weight": 1, "reward": {"kind": "exact", "extract": "last_number"}})
    (problem,) = problems({"kind": "weighted", "terms": terms}, ["Paris", "Rome", "Bern", "Wien"])
    assert problem.startswith("reward.terms.1.reward: with extract 'last_number' it does not pay")
    assert "'Paris'" in problem


def solved(number: int, **columns: str) -> dict[str, Any]:
    test = f"def check(candidate):\n    assert candidate(2) == {2 * number}\n"
    return {"prompt": "def times(x):\n    '''Times.'''\n", "entry_point": "times", "test": test, **columns}


@needs_bwrap
@pytest.mark.parametrize(
    ("form", "column", "program"),
    [
        ("humaneval", "canonical_solution", "    return {} * x\n"),
        ("humaneval", "canonical_solution", "def times(x):\n    return {} * x\n"),
        ("leetcode", "completion", "Here:\n```python\ndef times(x):\n    return {} * x\n```"),
    ],
)
def test_a_program_is_tried_by_the_data_sets_own_solution(form: str, column: str, program: str) -> None:
    code = {"kind": "code", "code": {"format": form}}
    rows = [solved(number, **{column: program.format(number)}) for number in range(2, 6)]
    assert problems(code, rows) == []
    wrong = [solved(number, **{column: program.format(number + 7)}) for number in range(2, 6)]
    (problem,) = problems(code, wrong)
    assert "does not pay for the right answer of 4 of 4 prompts" in problem
    assert problems(code, [solved(number) for number in range(2, 6)]) == []  # no solution, nothing to try


@needs_bwrap
def test_tests_that_wrong_programs_pass_are_named() -> None:
    loose = {"test": "def check(candidate):\n    assert candidate(2) > 0\n"}
    rows = [solved(n, canonical_solution=f"    return {n} * x\n") | loose for n in range(2, 6)]
    (problem,) = problems({"kind": "code", "code": {"format": "humaneval"}}, rows)
    assert "another prompt's answer on 4 of 4" in problem


def test_the_scorers_of_a_check_share_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(scorer_process, "_SHARED", weakref.WeakValueDictionary())
    real = scorer_process._start
    # Rewards of other tests may not be collected yet, and would lend their process.
    monkeypatch.setattr(scorer_process, "_SHARED", weakref.WeakValueDictionary())
    monkeypatch.setattr(scorer_process, "_start", lambda folder: started.append(folder) or real(folder))
    terms = [{"weight": 1, "reward": {"kind": "math"}}, {"weight": 1, "reward": {"kind": "math"}}]
    config = RewardConfig(kind="weighted", terms=terms)
    pairs = [(f"p{row}", json.dumps(f"\\sqrt{{{row}}} + x")) for row in range(2, 6)]
    with scorer_process.kept_workers():
        assert not check_ground_truths(config, pairs)
        assert not reward_doubts(config, pairs)
    assert len(started) == 1
    gc.collect()
    assert not scorer_process._SHARED.get("math")


def test_kinds_without_a_right_answer_are_not_tried() -> None:
    assert problems({"kind": "length", "max_words": 1}, [1, 2, 3, 4]) == []


def test_a_scorer_that_raises_on_free_text_says_wrong_and_keeps_the_reason() -> None:
    ground_truth = json.dumps(task("prime_factorization", 1)[0])
    reward = make_reward(RewardConfig(**GYM))
    (score,) = reward.score([RewardRequest("p", 0, (("user", "?"),), "I cannot help", ground_truth)])
    reward.close()
    assert (score.reward, score.status) == (0.0, "ok")
    assert score.detail.startswith("the scorer raised ValueError")


def test_a_grid_is_found_behind_other_lines_and_in_a_fence() -> None:
    ground_truth = task("sudoku", 1)[0]
    answer = ground_truth["entry"]["answer"]
    texts = [f"Here it is:\n{answer}\n", f"Here:\n```\n{answer}\n```", f"<answer>{answer}</answer> done"]
    requests = [
        RewardRequest("p", row, (("user", "?"),), text, json.dumps(ground_truth))
        for row, text in enumerate(texts)
    ]
    reward = make_reward(RewardConfig(**GYM))
    assert [score.reward for score in reward.score(requests)] == [1.0, 1.0, 1.0]
    reward.close()
