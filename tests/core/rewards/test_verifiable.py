"""Rewards that check against a ground truth: hand-made tables, real graded solutions, real tasks."""

import json
from functools import lru_cache
from pathlib import Path

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import Reward, RewardRequest, Score, refuse
from qrpo_core.rewards.registry import make_reward
from qrpo_core.rewards.verifiable.rewards import MATH_WINDOW, MathReward, math_window

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"


def request(text: str, ground_truth: object, row: int = 0) -> RewardRequest:
    return RewardRequest("p", row, (("user", "?"),), text, json.dumps(ground_truth))


def score(config: dict, text: str, ground_truth: object) -> float | None:
    (result,) = make_reward(RewardConfig(**config)).score([request(text, ground_truth)])
    assert result.status == "ok", result
    return result.reward


NUMBER = [
    ({}, "", 12, 0),
    ({}, "...!", 12, 0),
    ({}, "The answer is 12.", 12, 1),
    ({}, "12, not 13", 12, 0),
    ({}, "about 1,234.50", 1234.5, 1),
    ({}, "-3", -3, 1),
    ({}, "-3", 3, 0),
    ({}, "\u22123", "-3", 1),
    ({}, "3 - 1 = 2", 2, 1),
    ({}, "5kg", 5, 1),
    ({}, "\\boxed{18}", "18", 1),
    ({}, "18.0", 18, 1),
    ({}, "$1,234", "She has 30 * 41 = <<30*41=1230>>1230 and 4.\n#### 1,234", 1),
    ({}, "18 dollars", "$18", 1),
    ({}, "50%", "50 %", 1),
    ({}, "50%", 0.5, 0),
    ({}, "3/4", 0.75, 1),
    ({}, "0.1000001", 0.1, 1),
    ({}, "0.100001", 0.1, 1),
    ({}, "0.1000011", 0.1, 0),
    ({"tolerance": 0.1}, "1.1", 1, 1),
    ({"tolerance": 0.1}, "1.1001", 1, 0),
    ({"tolerance": 0}, "123456789012345678901234567890", 123456789012345678901234567890, 1),
    ({"tolerance": 0}, "123456789012345678901234567891", 123456789012345678901234567890, 0),
    ({}, "9" * 100_000, 9, 0),
    ({"extract": "last_integer"}, "3 apples for 2.50", 3, 1),
    ({"extract": "last_line"}, "5\nso 7 apples", 7, 1),
    ({"extract": "last_line"}, "7\nso it is", 7, 0),
    ({"extract": "answer_tag"}, "<answer>7 apples</answer> 8", 7, 1),
    ({"extract": "answer_tag"}, "7", 7, 0),
    ({"extract": "whole"}, " $7. ", 7, 1),
    ({"extract": "whole"}, "7 apples", 7, 0),
]


@pytest.mark.parametrize(("options", "text", "ground_truth", "expected"), NUMBER)
def test_number(options: dict, text: str, ground_truth: object, expected: float) -> None:
    assert score({"kind": "number", **options}, text, ground_truth) == expected


EXACT = [
    ({}, "", "Paris", 0),
    ({}, " Paris\n", "Paris", 1),
    ({}, "paris", "Paris", 0),
    ({}, "Paris.", "Paris", 0),
    ({}, "New \n York", "New York", 1),
    ({}, "e\u0301te\u0301", "été", 1),
    ({}, "12", 12, 1),
    ({}, "12.0", 12, 0),
    ({"extract": "last_line"}, "Hm.\nParis", "Paris", 1),
    ({"extract": "answer_tag"}, "<answer>Paris</answer>!", "Paris", 1),
    ({"extract": "last_integer"}, "It is 1,200.", "1200", 1),
]


@pytest.mark.parametrize(("options", "text", "ground_truth", "expected"), EXACT)
def test_exact(options: dict, text: str, ground_truth: object, expected: float) -> None:
    assert score({"kind": "exact", **options}, text, ground_truth) == expected


@lru_cache
def reasoning_gym_reward(extract: str | None = None) -> Reward:
    """One for all tests: its process takes seconds to start."""
    return make_reward(RewardConfig(kind="reasoning_gym", extract=extract))


@pytest.fixture(scope="module")
def math_reward() -> MathReward:
    return MathReward()


MATH = [
    ("", 5, 0),
    ("?!.", 5, 0),
    ("The answer is 12.", 12, 1),
    ("1/2", 0.5, 1),
    ("$\\frac{2}{4}$", "\\frac12", 1),
    ("so \\boxed{x=5}", "5", 1),
    ("\\boxed{1{,}234}", "#### 1,234", 1),
    ("\u22123", -3, 1),
    ("$\\{2,1\\}$", "$\\{1,2\\}$", 1),
    ("$x^2+2x+1$", "(x+1)^2", 1),
    ("$x^2+2x+2$", "(x+1)^2", 0),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
    ("100000000000000000000", 1e20, 1),
    ("(" * 3000, 5, 0),
    ("$$ " * 30_000 + "It is 7.", 7, 1),
    ("word " * 20_000, 7, 0),
]


@pytest.mark.parametrize(("text", "ground_truth", "expected"), MATH)
def test_math(math_reward: MathReward, text: str, ground_truth: object, expected: float) -> None:
    assert math_reward.score([request(text, ground_truth)]) == [Score(expected)]


def test_math_reads_the_end_of_a_long_completion() -> None:
    text = "x" * 50 + " " + "$1$ " * 5000
    assert len(math_window(text)) <= MATH_WINDOW
    assert text.endswith(math_window(text))
    assert math_window(text).startswith("$1$")
    assert math_window("a" * 9000) == "a" * MATH_WINDOW
    assert math_window("$1$") == "$1$"


@pytest.mark.parametrize(
    ("kind", "ground_truth", "remedy"),
    [
        ("number", '"1 or 2"', "holds 2 numbers"),
        ("number", '"#### none"', "holds 0 numbers"),
        ("number", "true", "a number, or a string"),
        ("number", "[1]", "a number, or a string"),
        ("number", "NaN", "NaN"),
        ("number", "1e99999999999999999999", "too large"),
        ("number", "not JSON", "JSON"),
        ("exact", '" "', "not empty"),
        ("exact", "null", "not empty"),
        ("math", '"..."', "no expression"),
        ("math", "[1]", "a number, or a string"),
        ("reasoning_gym", "3", "entry"),
        ("reasoning_gym", '{"task":"chain_sum","parameters":{},"entry":{"question":"?"}}', "entry"),
        (
            "reasoning_gym",
            '{"task":"sums","parameters":{},"entry":{"question":"","answer":"","metadata":{}}}',
            "'sums' not registered",
        ),
    ],
)
def test_an_unreadable_ground_truth_is_refused_with_its_prompt(
    kind: str, ground_truth: str, remedy: str
) -> None:
    reward = reasoning_gym_reward() if kind == "reasoning_gym" else make_reward(RewardConfig(kind=kind))
    with pytest.raises(DataError) as caught:
        refuse(reward, [("abc", ground_truth)])
    assert caught.value.where == "prompt abc"
    assert remedy in str(caught.value)


def graded_solutions() -> list[tuple[RewardRequest, bool]]:
    path = GSM8K / "model_solutions_400.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        ground_truth = row["ground_truth"].rpartition("\nA: ")[2]
        for key in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = row[key]
            rows.append((request(solution["solution"], ground_truth, place), solution["is_correct"]))
    return rows


def agreement(kind: str, rows: list[tuple[RewardRequest, bool]]) -> float:
    scores = make_reward(RewardConfig(kind=kind)).score([row for row, _ in rows])
    equal = [score.reward == float(correct) for score, (_, correct) in zip(scores, rows, strict=True)]
    return sum(equal) / len(equal)


def test_number_agrees_with_the_graders_of_1600_gsm8k_solutions() -> None:
    rows = graded_solutions()
    assert len(rows) == 1600
    assert {correct for _, correct in rows} == {True, False}
    assert agreement("number", rows) == 1  # measured: 1,600 of 1,600


def test_math_agrees_with_the_graders_of_gsm8k_solutions() -> None:
    assert agreement("math", graded_solutions()[::4]) == 1  # measured: 1,600 of 1,600 on all


def test_every_gsm8k_answer_is_a_ground_truth_and_right_by_it() -> None:
    path = GSM8K / "train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    scores = make_reward(RewardConfig(kind="number")).score([request(answer, answer) for answer in answers])
    assert len(scores) == 7473
    assert {score.reward for score in scores} == {1.0}


TASKS = ["chain_sum", "leg_counting", "basic_arithmetic", "simple_equations", "countdown", "word_sorting"]


@pytest.fixture(scope="module")
def entries() -> dict[str, list[tuple[str, dict]]]:
    """Three real entries of several tasks, as (answer, ground truth)."""
    import reasoning_gym

    found = {}
    for task in [*TASKS, "arc_agi", "prime_factorization"]:
        parameters = {"size": 3, "seed": 7}
        found[task] = [
            (entry["answer"], {"task": task, "parameters": parameters, "entry": entry})
            for entry in reasoning_gym.create_dataset(task, **parameters)
        ]
    return found


def test_reasoning_gym_gives_its_own_answer_1_and_a_wrong_one_less(
    entries: dict[str, list[tuple[str, dict]]],
) -> None:
    pairs = [pair for task in TASKS for pair in entries[task]]
    reward = reasoning_gym_reward("whole")
    right = reward.score([request(answer, ground_truth) for answer, ground_truth in pairs])
    wrong = reward.score([request("no idea, 7 of them", ground_truth) for _, ground_truth in pairs])
    assert right == [Score(1.0)] * len(pairs)
    assert all(score.status == "ok" and score.reward is not None and score.reward < 1 for score in wrong)


def test_reasoning_gym_with_an_extraction_that_a_chatty_model_can_meet(
    entries: dict[str, list[tuple[str, dict]]],
) -> None:
    answer, ground_truth = entries["chain_sum"][0]
    texts = [f"Sure! 4 terms give {answer}. Does that help?", f"It is {int(answer) + 1}.", "I cannot say."]
    rows = [request(text, ground_truth) for text in texts]
    reward = reasoning_gym_reward("last_integer")
    assert [score.reward for score in reward.score(rows)] == [1, 0, 0]
    by_line = reasoning_gym_reward()
    assert by_line.score([request(f"Let me see.\n{answer}\n", ground_truth)]) == [Score(1.0)]


def test_a_scorer_that_raises_says_wrong_and_keeps_its_message(
    entries: dict[str, list[tuple[str, dict]]],
) -> None:
    _, ground_truth = entries["prime_factorization"][0]
    (score,) = reasoning_gym_reward().score([request("x × y", ground_truth)])
    assert (score.reward, score.status) == (0.0, "ok")
    assert score.detail.startswith("the scorer raised ValueError: invalid literal for int()")


def test_an_entry_whose_metadata_did_not_survive_json_is_refused(
    entries: dict[str, list[tuple[str, dict]]],
) -> None:
    _, ground_truth = entries["arc_agi"][0]
    with pytest.raises(DataError, match=r"own answer 0\.05"):
        reasoning_gym_reward().score([request("x", ground_truth)])
