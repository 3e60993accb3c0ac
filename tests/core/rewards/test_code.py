"""The `code` reward: what is a program, what is a test, and what a row gets."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import RewardConfig
from qrpo_core.errors import ConfigError, DataError
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.code import CodeReward
from qrpo_core.rewards.code_run import Bench
from qrpo_core.rewards.config import CodeRewardConfig
from qrpo_core.rewards.registry import make_reward, reward_identity
from qrpo_core.rewards.sandbox import SandboxError

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
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


def leetcode(test: str, prompt: str = "from typing import *\n") -> str:
    return json.dumps({"prompt": prompt, "entry_point": "Solution().f", "test": test})


def mbpp(*tests: str, **more: Any) -> str:
    return json.dumps({"test_list": tests, **more})


SQUARES = mbpp("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")
REVERSED = leetcode(
    "def check(candidate):\n"
    "    assert is_same_list(candidate(list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
    "    assert is_same_list(candidate(head=list_node([5])), list_node([5]))\n",
    LISTS,
)


def request(program: str, reference: str | None, name: str = "p") -> RewardRequest:
    return RewardRequest(name, 0, (), f"Here it is:\n\n```python\n{program}\n```\nDone.", reference)


@pytest.fixture
def score() -> Any:
    def judged(program: str, reference: str, form: Any = "mbpp", **settings: Any) -> Score:
        reward = CodeReward(CodeRewardConfig(format=form, memory_mb=512, **settings))
        return reward.score([request(program, reference)])[0]

    return judged


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
    reference = leetcode(
        "def check(candidate):\n"
        "    node = candidate(list_node([1]))\n"
        "    while node is not None:\n        node = node.next\n"
        "    assert node is None\n",
        LISTS,
    )
    ring = "class Solution:\n    def f(self, head):\n        head.next = head\n        return head\n"
    got = score(ring, reference, "leetcode", seconds_per_test=1.0)
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
    reference = json.dumps(
        {
            "prompt": 'def helper(n):\n    return 2 * n\n\ndef double(n):\n    """Twice n."""\n',
            "entry_point": "double",
            "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(2) == helper(2)\n"
            "    assert candidate(0.5) == 1\n",
        }
    )
    assert score(block, reference, "humaneval").reward == reward


@needs_bwrap
def test_mbpp_tests_may_build_what_the_program_defines(score: Any) -> None:
    program = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "    def __eq__(self, other): return True\n"
        "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
        "def first(pair): return pair\n"
    )
    setup = "pair = Pair(1, 2)\npair.a = 5\npair.other = Pair(1, 1)"
    reference = mbpp(
        "assert total([pair, Pair(3, 4)]) == 14",
        "assert total([pair.other]) == 2",
        "assert first(pair) == pair",  # an object of the program proves nothing, equal to what it may be
        "assert pair",
        "try:\n    assert first(pair) == 3\nexcept BaseException:\n    pass\nassert True",
        test_setup_code=setup,
    )
    got = score(program, reference)
    assert got.reward == 2 / 5
    assert "no plain data" in got.detail


@needs_bwrap
def test_exceptions_that_tests_expect(score: Any) -> None:
    reference = mbpp(
        "try:\n    f(0)\nexcept ValueError as e:\n    assert str(e) == 'zero'\nelse:\n    assert False",
        "assert all(map(f, [1, 2]))",
        "assert f(3) is None",
    )
    program = "def f(x):\n    if x == 0: raise ValueError('zero')\n    if x < 3: raise StopIteration\n"
    assert score(program, reference).reward == 2 / 3  # all() over a map that ends early would be true


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
    start, failures = Bench.start, [2, 3]

    def failing(bench: Bench, *arguments: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise SandboxError("no more processes")
        return start(bench, *arguments)

    monkeypatch.setattr(Bench, "start", failing)
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


NUMPY = "import numpy as np\ndef f(x): return np.int64(x) * x"


@needs_bwrap
def test_packages_are_importable_where_they_are_named(score: Any) -> None:
    got = score(NUMPY, SQUARES)
    assert (got.reward, got.status) == (None, "refused")  # public judges have it: no wrong answer
    assert "numpy; to grade it, add it to reward.code.packages" in got.detail
    inside = "def f(x):\n    import numpy\n    return x * x"
    assert score(inside, SQUARES).status == "refused"
    assert score(NUMPY, SQUARES, packages=("numpy",)).reward == 1.0
    assert score("import yaml\n" + NUMPY, SQUARES, packages=("numpy",)).reward == 0.0
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install"):
        score(NUMPY, SQUARES, packages=("numpy", "no_such_package"))
    tests = mbpp("import numpy as np\nassert np.allclose(f(2), 4)", "assert type(f(2)) == int")
    assert score("def f(x): return x * x", tests, packages=("numpy",)).reward == 1.0


@needs_bwrap
@pytest.mark.parametrize(
    "program",
    [
        "import no_such_module\ndef f(x): return x * x",
        # What it says is not believed: it imports nothing that is absent.
        "raise ModuleNotFoundError(\"No module named 'numpy'\")",
        "try:\n    import numpy\nexcept ImportError:\n    pass\ndef f(x): return x",
    ],
)
def test_a_program_that_imports_what_no_judge_has_is_wrong(score: Any, program: str) -> None:
    got = score(program, SQUARES)
    assert (got.reward, got.status) == (0.0, "ok")
    assert score("# import numpy\n" + program, SQUARES).reward == 0.0


@needs_bwrap
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (mbpp("import numpy as np\nassert np.allclose(f(2), 4)"), "import numpy, which programs cannot"),
        (mbpp("assert f(2) == 4", test_imports=["import tabulate, numpy"]), "import numpy, tabulate, which"),
        (mbpp("assert f(2) == 4", code="import pandas\ndef f(x): return x"), "import pandas"),
        (
            mbpp("assert f(2) == 4", test_imports=["from math import no_such_name"]),
            "setup failed: ImportError",
        ),
        (mbpp("assert f(2) == 4", test_imports=["from heapq import merge"]), None),
    ],
)
def test_what_a_reference_lacks_is_an_error_of_the_data_set(reference: str, says: str | None) -> None:
    reward = CodeReward(CodeRewardConfig(format="mbpp"))
    if says is None:
        assert reward.problems([("p0", SQUARES), ("p1", reference)]) == []
        return
    found = reward.problems([("p0", SQUARES), ("p1", reference), ("p2", SQUARES), ("p3", reference)])
    assert [(problem.row, problem.prompt_id) for problem in found] == [(1, "p1"), (3, "p3")]
    assert re.search(says, found[0].remedy)
    with pytest.raises(DataError, match=says):
        reward.score([request("def f(x): return x", reference)])


def environment(folder: Path, **packages: str) -> str:
    """A virtual environment with packages that state their version, and one that requires the others."""
    import venv

    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in {**packages, "whole": "9"}.items():
        source = f"version = {version!r}\n" if name != "whole" else "".join(f"import {p}\n" for p in packages)
        (site / f"{name}.py").write_text(source)
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: {other}>=1\n" for other in packages if name == "whole")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    return str(folder)


@needs_bwrap
def test_packages_of_another_environment_and_their_versions(score: Any, tmp_path: Path) -> None:
    first, second = (environment(tmp_path / v, greeter=v) for v in ("1.5", "2.0"))
    program = "import greeter\ndef f(x): return greeter.version"
    reference = mbpp(
        "assert f(1) == '1.5'", "assert f(1) == '2.0'", "import greeter\nassert f(1) == greeter.version"
    )
    for python in (first, f"{first}/bin/python"):
        assert score(program, reference, python=python, packages=("greeter",)).reward == 2 / 3
    # What a package requires comes with it.
    assert score(program, reference, python=first, packages=("whole",)).reward == 2 / 3

    def identity(python: str | None, *packages: str) -> dict[str, Any]:
        code = {"format": "mbpp", "python": python, "packages": packages}
        return reward_identity(RewardConfig(kind="code", code=code))

    assert identity(first, "greeter") == identity(f"{first}/bin/python", "greeter")
    assert identity(first, "greeter") != identity(second, "greeter")
    assert identity(first, "whole")["identities"]["reward"]["greeter"] == "1.5"
    assert "identities" not in identity(None)
    with pytest.raises(ConfigError, match=r"reward.code.packages.*pip install numpy"):
        identity(first, "numpy")
    with pytest.raises(ConfigError, match=r"no interpreter of Python.*reward.code.python"):
        identity(str(tmp_path))


@needs_bwrap
def test_a_package_that_does_not_load_is_told_before_a_row(tmp_path: Path) -> None:
    python = environment(tmp_path / "env", greeter="1.5")
    (site,) = Path(python).glob("lib/python*/site-packages")
    (site / "greeter.py").write_text("raise RuntimeError('no licence')")
    config = CodeRewardConfig(format="mbpp", python=python, packages=("greeter",))
    with pytest.raises(ConfigError, match=r"'greeter' cannot be imported in the sandbox.*no licence"):
        CodeReward(config).problems([])


def test_without_a_sandbox_nothing_runs_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    row = request("def f(x): return x * x", SQUARES)
    with pytest.raises(ConfigError, match="apt install bubblewrap"):
        CodeReward(CodeRewardConfig(format="mbpp")).problems([("p", SQUARES)])
    unsafe = CodeReward(CodeRewardConfig(format="mbpp", unsafe=True, seconds_per_test=1.0))
    with pytest.warns(UserWarning, match="without a sandbox"):
        assert unsafe.score([row]) == [Score(1.0, "ok", "passed 3 of 3 (without a sandbox)")]
    endless = request("def f(x):\n    while True: pass", mbpp("assert f(1)"))
    bomb = request("def f(x): return bytearray(1 << 34)", mbpp("assert f(1)"))
    for got in unsafe.score([endless, bomb]):
        assert (got.reward, got.status) == (0.0, "ok")


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
