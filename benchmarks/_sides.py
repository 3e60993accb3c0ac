"""The near end of _steps.py: start a side of a comparison, let it take steps, compare what was found."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = ("chosen_ids", "rejected_ids")
#: Largest difference of a loss (nats) and of a gradient norm (relative) that rounding explains. In bf16 the
#: roundings of one step decide those of the next; in fp32 the same steps agree to 1e-5.
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (1e-1, 2e-1)}


class SideError(Exception):
    """A side that failed; the message has the last lines of its log."""


class Side:
    """A child process with its settings; see _steps.py for the messages.

    python, script : _qrpo_side.py or _trl_side.py and the interpreter with its packages.
    """

    def __init__(
        self,
        python: str,
        script: str,
        job: Path,
        settings: dict[str, dict[str, Any]],
        threads: int | None = None,
    ) -> None:
        self._log = job.with_name(f"{script}-{'-'.join(settings)[:80]}.log")
        settled = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if threads is not None:
            settled |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(HERE / script), str(job), json.dumps(settings)],
                env=os.environ | settled,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def begin(self) -> str:
        """Wait for the next setting and return its name."""
        return str(self._read()["setting"])

    def step(self) -> float:
        """Let it take a step; returns the seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read("seconds")["seconds"])

    def result(self) -> dict[str, Any]:
        """The result of the setting, after its last step. Raises SideError if the setting failed."""
        found: dict[str, Any] = self._read("result")["result"]
        return found

    def close(self) -> None:
        """End the child."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, wanted: str | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {}
        if "failed" in told:
            raise SideError(told["failed"])
        if not told or (wanted is not None and wanted not in told):
            lines = self._log.read_text(errors="replace").strip().splitlines()[-3:]
            raise SideError("; ".join(lines)[-300:] or "the process ended and printed nothing")
        return told


def step_tokens(job: dict[str, Any]) -> list[int]:
    """Tokens of each step, without padding: prompt and completion of both rows of its pairs."""
    pairs = [sum(len(pair["prompt_ids"]) + len(pair[key]) for key in ROWS) for pair in job["pairs"]]
    size = job["pairs_a_step"]
    return [sum(pairs[at : at + size]) for at in range(0, len(pairs), size)]


def with_rates(run: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Add tokens/s: the median over the steps after the warm-up."""
    warm, tokens = job["warm_up_steps"], step_tokens(job)
    rates = [count / spent for count, spent in zip(tokens[warm:], run["seconds"][warm:], strict=True)]
    return {"tokens_per_second": round(statistics.median(rates), 1)} | run


def ratio(ours: dict[str, Any], theirs: dict[str, Any], warm: int) -> dict[str, Any]:
    """Ours over theirs: the median and range over the steps of the ratio of tokens/s; and of peak memory."""
    each = [b / a for a, b in zip(ours["seconds"][warm:], theirs["seconds"][warm:], strict=True)]
    return {
        "tokens_per_second": round(statistics.median(each), 3),
        "range": [round(min(each), 3), round(max(each), 3)],
        "peak_memory": round(ours["peak_memory_gb"] / theirs["peak_memory_gb"], 3),
    }


def difference(run: dict[str, Any], base: dict[str, Any], precision: str) -> dict[str, Any]:
    """Largest differences of losses (nats) and gradient norms, and whether rounding explains them."""
    loss = max(abs(a - b) for a, b in zip(run["losses"], base["losses"], strict=True))
    norms = zip(run["gradient_norms"], base["gradient_norms"], strict=True)
    norm = max(abs(a - b) / b for a, b in norms)
    most_loss, most_norm = TOLERANCE[precision]
    return {
        "loss_nats": float(f"{loss:.2g}"),
        "gradient_norm_relative": float(f"{norm:.2g}"),
        "explained_by_rounding": loss <= most_loss and norm <= most_norm,
    }
