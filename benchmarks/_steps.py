"""What both sides of a comparison of training steps share: a child that trains a step when it is told to.

TRL's side imports this module in an environment without our package, so it imports none of it. The child
tells, a JSON object a line, `{"setting": NAME}`, then for each step `{"seconds": S}`, then `{"result": …}` or
`{"failed": WHY}`, and goes on with the next setting. It waits for a line of standard input before each step,
so that two sides can take turns (`_sides.py` is the other end).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class FinishedError(Exception):
    """Ends a training behind its last step, before anything is saved."""


class Meter(TrainerCallback):  # type: ignore[misc]
    """Seconds, losses, passes and memory of a Trainer's optimiser steps, timed from end to end of a step.

    tell : writes a message to the other end. The trainer calls `count` in every compute_loss.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._seconds: list[float] = []
        self._logs: list[dict[str, float]] = []
        self._began = self._before = 0.0
        self._positions: list[list[int]] = [[]]

    def count(self, positions: int) -> None:
        """Count a pass, one forward and backward of a part of a step, and its positions, padding included."""
        self._positions[-1].append(positions)

    def largest_pass(self) -> tuple[int, int]:
        """The step with the pass of most positions, and their number."""
        return max(
            ((step, size) for step, passes in enumerate(self._positions) for size in passes),
            key=lambda found: found[1],
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._before = resident_gb()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        self._positions.append([])
        self._tell({"seconds": self._seconds[-1]})
        if state.global_step < state.max_steps:
            self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._logs = [entry for entry in state.log_history if "loss" in entry]
        raise FinishedError

    def result(self) -> dict[str, Any]:
        """Of all steps, the first ones included: seconds, losses, gradient norms, passes and positions; GB.

        memory_before_first_step_gb : held with the weights loaded.
        """
        if not self._seconds:
            raise RuntimeError("the meter saw no step")
        return {
            "seconds": [round(value, 4) for value in self._seconds],
            "passes": [len(each) for each in self._positions if each],
            "positions": [sum(each) for each in self._positions if each],
            "peak_memory_gb": round(peak_gb(), 3),
            "memory_before_first_step_gb": round(self._before, 3),
            "losses": [entry["loss"] for entry in self._logs],
            "gradient_norms": [entry["grad_norm"] for entry in self._logs],
            "threads": torch.get_num_threads(),
        }

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the other end is gone")
        self._began = time.perf_counter()


@contextlib.contextmanager
def metered(kind: Any, meter: Meter) -> Iterator[None]:
    """While it lasts, trainers of this class and of its subclasses carry the meter and count their passes."""
    make, loss = kind.__init__, kind.compute_loss

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(meter)

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        row = inputs.get("packed", inputs.get("input_ids"))  # our packed row, or their table
        meter.count(getattr(row, "input_ids", row).numel())
        return loss(self, model, inputs, *args, **kwargs)

    kind.__init__, kind.compute_loss = init, compute_loss
    try:
        with contextlib.suppress(FinishedError):
            yield
    finally:
        kind.__init__, kind.compute_loss = make, loss


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bf16_tflops(size: int = 8192, rounds: int = 20) -> float:
    """TFLOP/s of bfloat16 products [size, size] x [size, size]; of small ones without a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        left @ right
    synchronize()
    return round(2 * size**3 * rounds / (time.perf_counter() - began) / 1e12, 3)


def resident_gb() -> float:
    """What this process holds now: CUDA's allocated memory where there is CUDA, else its resident size."""
    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated()) / 1e9
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def peak_gb() -> float:
    """The most that this process has held: on CUDA since training began, else since the process did."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve(run: Callable[[dict[str, Any], dict[str, Any], Callable[[dict[str, Any]], None]], Any]) -> None:
    """Run every setting of the command line (JOB.json, settings by name in JSON) and tell what came of it.

    run : takes job, setting and `tell`; returns the result. A setting that fails does not end the others.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    job = json.loads(Path(sys.argv[1]).read_text())
    for name, setting in json.loads(sys.argv[2]).items():
        tell({"setting": name})
        try:
            tell({"result": run(job, setting, tell)})
        except Exception as error:
            traceback.print_exc()
            told = (str(error).strip().splitlines() or [""])[0]
            tell({"failed": f"{type(error).__name__}: {told}"[:300]})
