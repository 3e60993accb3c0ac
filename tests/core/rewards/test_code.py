"""The `code` reward: what is a program, what is a test, and what a row gets."""

from __future__ import annotations

import gzip
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.code.reward import CodeReward
from qrpo_core.rewards.code.runner import Bench
from qrpo_core.rewards.code.sandbox.bubblewrap import SandboxError
from qrpo_core.rewards.registry import make_reward
from tests.core.rewards.code_problems import SQUARES, leetcode, mbpp, needs_bwrap, request

DATA = Path(__file__, "..", "..", "..", "..", "..", "shared", "data").resolve()

LISTS = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head

def is_same_list(a, b):
    while a is not None and b is not None:
        if a.val != b.val:
            return False
        a, b = a.next, b.next
    return a is None and b is None
"""


REVERSED = leetcode(
    "def check(candidate):\n"
    "    assert is_same_list(candidate(list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
    "    assert is_same_list(candidate(head=list_node([5])), list_node([5]))\n",
    LISTS,
)


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "reward", "detail"),
    [
        ("def f(x): return x * x", 1.0, "passed 3 of 3"),
        ("def f(x): return 4", 1 / 3, "passed 1 of 3; test 2: AssertionError:"),
        ("def f(x): return 2 * x", 1 / 3, "passed 1 of 3; test 2: AssertionError:"),
        ("def f(x): return float(x * x)", 1.0, "passed 3 of 3"),
        ("f = lambda x: 9 // (x - 2)", 1 / 3, "test 1: ZeroDivisionError"),
        ("def g(x): return x * x", 0.0, "test 1: KeyError"),
        ("1 / 0", 0.0, "did not load: ZeroDivisionError"),
        ("def f(x) return", 0.0, "did not load: SyntaxError"),
        ("import sys\ndef f(x): sys.exit(0)", 0.0, "test 1: the process ended"),
        ("import sys\ndef f(x):\n if x == 3: sys.exit(0)\n return x * x", 2 / 3, "test 2: the process ended"),
        ("print('hello')\ndef f(x):\n print(x, flush=True)\n return x * x", 1.0, "passed 3 of 3"),
        ("print(__name__)\nif __name__ == '__main__': f(input())\ndef f(x): return x * x", 1.0, "passed 3"),
        ("class set: pass\ndef len(x): return 0\ndef f(x): return x * x", 1.0, "passed 3 of 3"),
    ],
)
def test_the_reward_is_the_share_of_tests_passed(
    score: Any, program: str, reward: float, detail: str
) -> None:
    got = score(program, SQUARES)
    assert (got.reward, got.status) == (reward, "ok")
    assert detail in got.detail


@needs_bwrap
def test_no_program_is_a_wrong_answer() -> None:
    reward = make_reward(RewardConfig(kind="code", code=CodeRewardConfig(format="mbpp")))
    texts = ["def f(x): return x * x", "I cannot say.", "```sh\nls\n```"]
    got = reward.score([RewardRequest("p", i, (), text, SQUARES) for i, text in enumerate(texts)])
    assert [score.reward for score in got] == [1.0, 0.0, 0.0]
    assert got[1].detail.startswith("no program in the completion")


@needs_bwrap
def test_only_what_follows_the_thinking_is_the_program() -> None:
    reward = make_reward(RewardConfig(kind="code", code=CodeRewardConfig(format="mbpp")))
    good, bad = (f"```python\ndef f(x): return {value}\n```\n" for value in ("x * x", "x"))
    texts = [
        f"<think>\n{bad}No.\n</think>\n{good}",
        f"<think>\n{good}</think>\n{bad}",
        f"<think>\n{good}</think>\nDone.",
    ]
    got = reward.score([RewardRequest("p", i, (), text, SQUARES) for i, text in enumerate(texts)])
    assert [score.reward for score in got] == [1.0, 0.0, 0.0]


@needs_bwrap
def test_the_program_is_joined_from_blocks_of_a_completion(score: Any) -> None:
    draft = "def f(x): return x\n```\nThat is wrong. With\n```python\nfrom operator import mul\n```\n"
    assert score(draft + "it is\n```python\ndef f(x): return mul(x, x)", SQUARES).reward == 1.0


@needs_bwrap
def test_a_test_that_takes_too_long_costs_that_test(score: Any) -> None:
    program = "def f(x):\n    while x == 3: pass\n    return x * x"
    got = score(program, SQUARES, seconds_per_test=1.0)
    assert got == Score(2 / 3, "ok", "passed 2 of 3; test 2: no answer in 1 s")


@needs_bwrap
@pytest.mark.parametrize(
    ("program", "passed"),
    [("while True: pass", 0), ("def f(x):\n    while x == 3: pass\n    return x * x", 1)],
)
def test_a_row_without_a_turn_for_every_test_has_no_score(score: Any, program: str, passed: int) -> None:
    got = score(program, SQUARES, seconds_per_test=3.0, seconds_per_program=1.5)
    assert (got.reward, got.status) == (None, "timeout")
    assert f"passed {passed} of 3" in got.detail


@needs_bwrap
def test_instances_of_the_setups_classes_travel(score: Any) -> None:
    solution = (
        "class Solution:\n    def f(self, head):\n        last = None\n        while head:\n"
        "            head.next, last, head = last, head, head.next\n        return last\n"
    )
    assert score(solution, REVERSED, "leetcode").reward == 1.0
    own = "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\n"
    assert score(own + solution, REVERSED, "leetcode").reward == 1.0
    assert score(solution.replace("return last", "return head"), REVERSED, "leetcode").reward == 0.0
    ring = "class Solution:\n    def f(self, head):\n        head.next = head\n        return head\n"
    assert score(ring, REVERSED, "leetcode").reward == 0.0
    lies = (
        "class Any:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n"
        "class Solution:\n    def f(self, head):\n"
        "        node = head\n        while node: node.val, node = Any(), node.next\n        return head\n"
    )
    assert score(lies, REVERSED, "leetcode").reward == 0.0


@needs_bwrap
def test_a_value_that_never_ends_in_the_test_costs_that_test(score: Any) -> None:
    ground_truth = leetcode(
        "def check(candidate):\n"
        "    node = candidate(list_node([1]))\n"
        "    while node is not None:\n        node = node.next\n"
        "    assert node is None\n",
        LISTS,
    )
    ring = "class Solution:\n    def f(self, head):\n        head.next = head\n        return head\n"
    got = score(ring, ground_truth, "leetcode", seconds_per_test=1.0)
    assert (got.reward, got.status) == (0.0, "ok")
    assert "did not end" in got.detail


@needs_bwrap
@pytest.mark.parametrize(
    ("block", "reward"),
    [
        ("def double(n):\n    return helper(n)", 1.0),
        (
            "from math import sqrt\ndef helper(n):\n    return n + n\ndef double(n):\n    return helper(n)",
            1.0,
        ),
        ("    return helper(n)", 1.0),
        ("return helper(n)", 1.0),
        ("def other(n):\n    return helper(n)", 0.0),
    ],
)
def test_a_humaneval_block_is_the_function_or_its_body(score: Any, block: str, reward: float) -> None:
    ground_truth = json.dumps(
        {
            "prompt": 'def helper(n):\n    return 2 * n\n\ndef double(n):\n    """Twice n."""\n',
            "entry_point": "double",
            "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == helper(2)\n"
            "    assert candidate(0.5) == 1\n",
        }
    )
    assert score(block, ground_truth, "humaneval").reward == reward


@needs_bwrap
def test_mbpp_tests_may_build_what_the_program_defines(score: Any) -> None:
    program = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "    def __eq__(self, other): return True\n"
        "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
        "def first(pair): return pair\n"
    )
    setup = "pair = Pair(1, 2)\npair.a = 5\npair.other = Pair(1, 1)"
    ground_truth = mbpp(
        "assert total([pair, Pair(3, 4)]) == 14",
        "assert total([pair.other]) == 2",
        "assert first(pair) == pair",  # an object of the program proves nothing, equal to what it may be
        "assert pair",
        "try:\n    assert first(pair) == 3\nexcept BaseException:\n    pass\nassert True",
        test_setup_code=setup,
    )
    got = score(program, ground_truth)
    assert got.reward == 2 / 5
    assert "no plain data" in got.detail


@needs_bwrap
def test_exceptions_that_tests_expect(score: Any) -> None:
    ground_truth = mbpp(
        "try:\n    f(0)\nexcept ValueError as e:\n    assert str(e) == 'zero'\nelse:\n    assert False",
        "assert all(map(f, [1, 2]))",
        "assert f(3) is None",
    )
    program = "def f(x):\n    if x == 0: raise ValueError('zero')\n    if x < 3: raise StopIteration\n"
    assert score(program, ground_truth).reward == 2 / 3  # all() over a map that ends early would be true


@needs_bwrap
def test_a_reply_to_another_question_is_no_answer(score: Any) -> None:
    # The forged reply has the right value: it is refused because it cannot carry the question's nonce.
    program = """
import os
def f(x):
    for nonce in (bytes(16), os.urandom(16)):
        message = nonce + b'{"value":{"r":%d,"n":[]}}' % (x * x)
        for fd in range(3, 9):
            try: os.write(fd, len(message).to_bytes(4, "big") + message)
            except OSError: pass
"""
    got = score(program, SQUARES)
    assert got == Score(0.0, "ok", "passed 0 of 3; test 1: its reply is to another question")


@needs_bwrap
def test_what_a_test_cannot_send_is_no_score(score: Any) -> None:
    got = score("def f(g): return g(1)", mbpp("assert f(lambda x: x) == 1"))
    assert (got.reward, got.status) == (None, "sandbox_error")
    assert "tried 3 times: test 1: a value of type 'function'" in got.detail


@needs_bwrap
def test_a_failing_harness_is_tried_again_and_never_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = CodeReward(CodeRewardConfig(format="mbpp", processes=1))
    assert reward.problems([("p", SQUARES)]) == []
    program, failures = Bench.program, [2, 3]

    def failing(bench: Bench) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise SandboxError("no more processes")
        return program(bench)

    monkeypatch.setattr(Bench, "program", failing)
    good = request("def f(x): return x * x", SQUARES)
    assert reward.score([good])[0].reward == 1.0
    failures[0] = 3
    assert reward.score([good, good]) == [
        Score(None, "sandbox_error", "tried 3 times: no more processes"),
        Score(1.0, "ok", "passed 3 of 3"),
    ]


@needs_bwrap
def test_scores_stand_in_the_order_of_the_requests_and_progress_is_told() -> None:
    programs = [f"import time\ntime.sleep({i % 3 / 10})\ndef f(x): return x * x * {i % 2}" for i in range(8)]
    reward = CodeReward(CodeRewardConfig(format="mbpp", processes=3))
    told: list[int] = []
    scores = reward.score([request(program, SQUARES) for program in programs], told.append)
    assert [score.reward for score in scores] == [i % 2 for i in range(8)]
    assert told == [1] * 8
    assert reward.score([]) == []


@needs_bwrap
def test_an_error_while_scoring_leaves_no_thread(score: Any) -> None:
    reward = CodeReward(CodeRewardConfig(format="mbpp", processes=2, seconds_per_test=100))
    rows = [request("def f(x): return x * x", SQUARES), *[request("while True: pass", SQUARES)] * 4]

    def interrupted(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward.score(rows, interrupted)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("qrpo-code")] == []


def solutions(path: Path, form: str) -> list[RewardRequest]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:  # type: ignore[attr-defined]
        rows = [json.loads(line) for line in lines]
    answer = "code" if form == "mbpp" else "completion"
    keys = ("test_list", "test_setup_code") if form == "mbpp" else ("prompt", "entry_point", "test")
    return [
        request(row[answer], json.dumps({key: row[key] for key in keys}), f"{form} {row['task_id']}")
        for row in random.Random(0).sample(rows, 60)
    ]


@needs_bwrap
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name"),
    [("leetcode", "leetcode/LeetCodeDataset-v0.2.0-test.jsonl.gz"), ("mbpp", "mbpp/mbpp.jsonl")],
)
def test_reference_solutions_pass(form: Any, name: str) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"../shared/data/{name} is absent")
    rows = solutions(DATA / name, form)
    scores = CodeReward(CodeRewardConfig(format=form)).score(rows)
    failed = [(r.prompt_id, s.detail) for r, s in zip(rows, scores, strict=True) if s.reward != 1]
    assert len(failed) <= 1, failed  # one in a hundred of all do not: benchmarks/code_reward.py names them
