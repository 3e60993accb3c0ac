"""AlpacaEval's judge on loopback: a real HTTP server with log-probabilities, and the package where it is."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.core.rewards.judge_server import Reply, said

#: An environment that has alpaca-eval, where this one lacks it.
PYTHON = os.environ.get("QRPO_ALPACA_EVAL_PYTHON")


@cache
def has_package() -> bool:
    """Whether the package is here, or in the environment that QRPO_ALPACA_EVAL_PYTHON names."""
    command = [PYTHON or sys.executable, "-c", "import importlib.metadata as m; m.version('alpaca-eval')"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_package = pytest.mark.skipif(
    not has_package(), reason="needs alpaca-eval: pip install 'qrpo[alpaca-eval]', or QRPO_ALPACA_EVAL_PYTHON"
)


def outputs(body: dict[str, Any]) -> tuple[str, str]:
    """The outputs called m and M in a question."""
    parts = str(body["messages"][-1]["content"]).split('"output": """')[1:]
    first, second = (part.split('"""')[0] for part in parts)
    return first, second


def preferring(share: Callable[[str, str], float]) -> Callable[[dict[str, Any], int], Reply]:
    """Answers with the probability `share(first, second)` for the first output, as log-probs of m and M."""

    def answer(body: dict[str, Any], turn: int) -> Reply:
        value = share(*outputs(body))
        top = [
            {"token": "m", "logprob": math.log(value)},
            {"token": "M", "logprob": math.log(1 - value)},
            {"token": "Both", "logprob": -20.0},
        ]
        best = max(top, key=lambda each: each["logprob"])
        return said(best["token"], tokens=[{**best, "top_logprobs": top}])

    return answer


def write_gamed(home: Path, count: int) -> None:
    """The hub's cache below `home` (HF_HOME) with made data of the length model for `count` instructions."""
    folder = home / "hub" / "datasets--tatsu-lab--alpaca_eval"
    (folder / "refs").mkdir(parents=True)
    (folder / "snapshots" / "made").mkdir(parents=True)
    (folder / "refs" / "main").write_text("made")
    lines = ["index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline,model"]
    for sign in (-1, 1):
        for index in range(count):
            wave = math.sin(index)
            lines.append(f"{index},{0.5 + 0.2 * sign},{sign * (1 + 0.1 * wave)},{wave},False,made{sign}")
    (folder / "snapshots" / "made" / "df_gamed.csv").write_text("\n".join(lines) + "\n")


def write_baseline(path: Path, count: int) -> list[dict[str, str]]:
    """AlpacaEval's file of a baseline's outputs: a JSON array, an object for each instruction."""
    rows = [
        {"dataset": "made", "instruction": f"Say {number}", "output": f"{number}!", "generator": "baseline"}
        for number in range(count)
    ]
    path.write_text(json.dumps(rows, indent=2))
    return rows
