"""Programs and tests from completions and ground truths."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import refuse
from qrpo_core.rewards.code.formats import read_problem
from qrpo_core.rewards.code.reward import CodeReward


def leetcode(test: str, prompt: str = "from typing import *\n") -> str:
    return json.dumps({"prompt": prompt, "entry_point": "Solution().f", "test": test})


def mbpp(*tests: str, **more: Any) -> str:
    return json.dumps({"test_list": tests, **more})


SQUARES = mbpp("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")


@pytest.mark.parametrize(
    ("form", "ground_truth", "says"),
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
        ("leetcode", leetcode("def check(f, g):\n    assert f(1)"), r"check\(candidate\)"),
        ("leetcode", leetcode("def test_a(client):\n    assert f(1)"), "test_a takes arguments"),
        ("mbpp", '{"test": "x = 1"}', "no function test_"),
        ("mbpp", '{"test": "from solution import f as g\\ndef test_a(): assert g(1)"}', "another name"),
        ("mbpp", '{"input_output": "{}"}', "standard input and output are not run"),
        ("leetcode", leetcode("assert candidate(1)"), r"check\(candidate\)"),
        ("leetcode", leetcode("def check(candidate):\n    return\n    assert candidate(1)"), "one by one"),
        ("humaneval", leetcode("def check(candidate):\n    assert candidate(1", ""), "as Python"),
        ("humaneval", leetcode("def check(candidate):\n    assert candidate(1)", "def f(:"), "as Python"),
    ],
)
def test_a_ground_truth_of_the_wrong_form_is_refused(form: Any, ground_truth: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        refuse(CodeReward(CodeRewardConfig(format=form)), [("p7", ground_truth)])


def test_a_missing_ground_truth_is_refused() -> None:
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


@pytest.mark.parametrize(
    ("form", "row", "tests"),
    [
        ("humaneval", {"test": "def check(f):\n    assert f(1) == 1"}, ["f = candidate\nassert f(1) == 1"]),
        (
            "humaneval",  # as in EvalPlus: the assert stands in a function of the test
            {
                "test": "def near(a, b): return a == b\ndef same(a, b):\n    assert near(a, b)\n"
                "def also(a, b): same(a, b)\n"
                "def check(candidate):\n    pairs = [(1, 1)]\n    for a, b in pairs: also(candidate(a), b)\n"
            },
            ["pairs = [(1, 1)]\nfor a, b in pairs:\n    also(candidate(a), b)"],
        ),
        (
            "humaneval",
            {
                "test": "import unittest\nclass T(unittest.TestCase):\n"
                "    def setUp(self): self.x = 1\n    def test_a(self): self.assertEqual(add(self.x), 1)\n"
            },
            ["T('test_a').debug()"],
        ),
        ("mbpp", {"test": "from solution import add\ndef test_a():\n    assert add(1) == 1"}, ["test_a()"]),
        ("mbpp", {"test_cases": ["assert add(1) == 1"]}, ["\nassert add(1) == 1"]),
        ("mbpp", {"test_list": '["assert add(1) == 1"]', "test_setup_code": None}, ["\nassert add(1) == 1"]),
    ],
)
def test_forms_of_tests(form: Any, row: dict[str, Any], tests: list[str]) -> None:
    problem = read_problem(json.dumps({"prompt": "", "entry_point": "add", **row}), form)
    assert list(problem.tests) == tests
    assert problem.wanted == ("add",)


@pytest.mark.parametrize(
    ("ground_truth", "modules"),
    [
        (mbpp("import numpy.linalg as l\nassert f(1)", test_imports=["from a.b import c"]), ("a", "numpy")),
        (mbpp("try:\n    import numpy\nexcept ImportError:\n    import cupy\nassert f(1)"), ("cupy",)),
        (mbpp("def g():\n    from pandas import NA\nassert f(1)", code="import heapq"), ("heapq", "pandas")),
        (mbpp("assert f(1)", code="  import x"), ()),  # no Python: the body of a function
    ],
)
def test_the_modules_that_a_ground_truth_needs(ground_truth: str, modules: tuple[str, ...]) -> None:
    assert read_problem(ground_truth, "mbpp").imports == modules


def test_builtins_and_modules_in_tests_are_never_the_programs() -> None:
    names = read_problem(mbpp("assert set(f(1)) == set([sys.maxsize])"), "mbpp").names
    assert names == ("f",)
    assert read_problem(mbpp("assert sum(1, 2) == 3"), "mbpp").names == ("sum",)
