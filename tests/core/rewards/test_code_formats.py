"""Programs and tests from completions and references."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qrpo_core.errors import DataError
from qrpo_core.rewards.base import refuse
from qrpo_core.rewards.code import CodeReward
from qrpo_core.rewards.code_formats import first_block, read_problem
from qrpo_core.rewards.config import CodeRewardConfig


def leetcode(test: str, prompt: str = "from typing import *\n") -> str:
    return json.dumps({"prompt": prompt, "entry_point": "Solution().f", "test": test})


def mbpp(*tests: str, **more: Any) -> str:
    return json.dumps({"test_list": tests, **more})


SQUARES = mbpp("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("a\n```\nx\n```\n```python\ny\n```", "x\n"),
        ("```Python3\r\nx\r\n```", "x\r\n"),
        ("```py\n\n```", "\n"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("```bash\nls\n```\n\n```python\nx\n```", "x\n"),
        ("```bash\nls\n```\n", None),
        ("```python\nx = '```'\ny\n```", "x = '```'\ny\n"),
        ("```python\nx = 1\n", None),
        ("~~~python\nx\n```\ny\n~~~", "x\n```\ny\n"),
        ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
        ("`code`\n```json\n{}\n```\n```\nx\n```", "x\n"),
        ("text `x` only", None),
        ("", None),
    ],
)
def test_the_first_fenced_block_is_the_program(text: str, block: str | None) -> None:
    assert first_block(text) == block


@pytest.mark.parametrize(
    ("form", "reference", "says"),
    [
        ("mbpp", "[", "JSON object"),
        ("mbpp", "3", "test_list"),
        ("mbpp", "[" * 100_000, "JSON object"),
        ("mbpp", mbpp(), "empty"),
        ("mbpp", '{"test_list": "assert f(1)"}', "list of strings"),
        ("mbpp", mbpp("f(1) == 2"), "asserts nothing"),
        ("mbpp", mbpp("assert f(1 =="), "as Python"),
        ("mbpp", mbpp("assert sorted([1]) == list([1])"), "no function"),
        ("leetcode", SQUARES, "prompt, entry_point, test"),
        ("leetcode", leetcode("def check(candidate): pass"), "asserts nothing"),
        ("leetcode", leetcode("def check(f):\n    assert f(1)"), r"check\(candidate\)"),
        ("leetcode", leetcode("assert candidate(1)"), r"check\(candidate\)"),
        ("leetcode", leetcode("def check(candidate):\n    return\n    assert candidate(1)"), "one by one"),
        ("humaneval", leetcode("def check(candidate):\n    assert candidate(1", ""), "as Python"),
        ("humaneval", leetcode("def check(candidate):\n    assert candidate(1)", "def f(:"), "as Python"),
    ],
)
def test_a_reference_of_the_wrong_form_is_refused(form: Any, reference: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        refuse(CodeReward(CodeRewardConfig(format=form)), [("p7", reference)])


def test_a_missing_reference_is_refused() -> None:
    with pytest.raises(DataError, match="p7"):
        refuse(CodeReward(CodeRewardConfig(format="mbpp")), [("p7", None)])


def test_each_assert_is_a_test_with_what_stands_before_it() -> None:
    problem = read_problem(
        leetcode(
            "def twice(x):\n    return 2 * x\n\n"
            "def check(candidate):\n"
            "    x = twice(1)\n"
            "    assert candidate(x) == 4\n"
            "    for i in range(3):\n        assert candidate(i) == i * i, i\n"
            "    y = 3\n"
            "    assert candidate(y) == 9\n"
            "check(None)\n"
        ),
        "humaneval",
    )
    assert problem.tests == (
        "x = twice(1)\nassert candidate(x) == 4",
        "x = twice(1)\nfor i in range(3):\n    assert candidate(i) == i * i, i",
        "x = twice(1)\ny = 3\nassert candidate(y) == 9",
    )
    assert "def twice" in problem.examiner_setup
    assert "twice" not in problem.judged_setup


def test_builtins_and_modules_in_tests_are_never_the_programs() -> None:
    names = read_problem(mbpp("assert set(f(1)) == set([sys.maxsize])"), "mbpp").names
    assert names == ("f",)
    assert read_problem(mbpp("assert sum(1, 2) == 3"), "mbpp").names == ("sum",)
