"""Ground truths and requests for tests of the reward `code`."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from qrpo_core.rewards.base import RewardRequest

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def leetcode(test: str, prompt: str = "from typing import *\n") -> str:
    return json.dumps({"prompt": prompt, "entry_point": "Solution().f", "test": test})


def mbpp(*tests: str, **more: Any) -> str:
    return json.dumps({"test_list": tests, **more})


SQUARES = mbpp("assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1")


def request(program: str, ground_truth: str | None, name: str = "p") -> RewardRequest:
    return RewardRequest(name, 0, (), f"Here it is:\n\n```python\n{program}\n```\nDone.", ground_truth)
