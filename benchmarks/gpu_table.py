"""Run every part of the GPU benchmark in a process of its own, and print one table (see gpu.sh).

A part has a time limit and a result file, which it writes as it goes. A part that fails, is missing a package
or runs past its limit shows in the table with the reason, beside what it had measured by then; the others
run. All together end when the minutes are over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _gpu_rows import ROWS_OF, Row, markdown
from _result import ROOT, about, options, publish, versions

HERE = Path(__file__).resolve().parent
#: Packages whose versions decide the numbers.
PACKAGES = ("transformers", "accelerate", "trl", "peft", "vllm", "triton")


@dataclass(frozen=True)
class Part:
    """A script with its arguments on a GPU and, for --tiny, anywhere; and the most seconds it may take."""

    script: str
    seconds: int
    gpu: str
    tiny: str


_TINY_TRAINING = "--model tiny --pairs 2 --rows 8 40 --max-tokens 256 --warm-up 1 --steps 2"
PARTS = {
    "training_135m": Part(
        "gpu_training.py",
        100,
        "--model 135m --settings ours_dpo ours_qrpo ours_dpo_uncompiled",
        f"{_TINY_TRAINING} --settings ours_dpo",
    ),
    "training_1b": Part(
        "gpu_training.py",
        150,
        "--model 1b --settings ours_dpo ours_qrpo ours_dpo_bfloat16_weights ours_dpo_checkpointing",
        f"{_TINY_TRAINING} --settings ours_dpo ours_qrpo",
    ),
    "reference_logprobs": Part(
        "reference_logprobs.py",
        60,
        "--random-model 1b --rows 192 --turns 3 --without-alone",
        "--random-model tiny --rows 6 --turns 1",
    ),
    "sampling": Part(
        "gpu_sampling.py",
        60,
        "--model 135m",
        "--model tiny --prompts 2 --samples 2 --new-tokens 4 --batch-sizes 2 4",
    ),
    "head": Part("head.py", 40, "--model 1b", "--model tiny --tokens 8 --rounds 1"),
    "vllm": Part(
        "vllm_sampling.py",
        230,
        "--random-model 135m --prompts 128 --batch-invariant",
        "--random-model tiny --prompts 2 --samples 2 --rounds 1 --max-new-tokens 4 --eager",
    ),
    "logprob_error": Part("logprob_error.py", 120, "--model 1b --rows 48", "--model tiny --rows 4"),
}
#: Run only if they are named: the eight minutes are not for them.
EXTRA = ("logprob_error",)


def run(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command in a process group of its own, its output in `log`; the reason if it did not succeed."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return f"ran past its {seconds:.0f} seconds"
        except KeyboardInterrupt:
            raise SystemExit("interrupted") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started may outlive it
            process.wait()
    if not status:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or [f"exit status {status}"])[-1][:200]


def measure(name: str, part: Part, asked: Any, folder: Path, seconds: float) -> list[Row]:
    """Run a part; the rows of the table that it makes."""
    result = folder / f"{name}.json"
    result.unlink(missing_ok=True)
    words = (part.tiny if asked.tiny else part.gpu).split()
    command = [sys.executable, str(HERE / part.script), *words, "--output", str(result)]
    if part.script == "gpu_training.py":
        command += ["--trl-python", os.environ.get("TRL_PYTHON", sys.executable)]
    reason = run(command, folder / f"{name}.log", seconds)
    try:
        found: dict[str, Any] = json.loads(result.read_text())
    except (OSError, ValueError):
        found = {}
    rows = []
    try:
        rows = ROWS_OF[name](found) if found else []
    except (KeyError, TypeError, ValueError) as error:
        reason = reason or f"its result is not whole: {error!r}"
    rows += [Row(f"{name}: {what}", reason=why) for what, why in found.get("failed", {}).items()]
    return rows + ([Row(name, reason=reason)] if reason else [])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=[name for name in PARTS if name not in EXTRA]
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    asked = parser.parse_args()
    folder = asked.output or HERE / "results" / ("gpu-tiny" if asked.tiny else "gpu")
    folder.mkdir(parents=True, exist_ok=True)
    head = about("the GPU benchmark", versions=versions(*PACKAGES))
    if head["hardware"]["gpu"] is None and not asked.tiny:
        raise SystemExit("no GPU: nothing was measured; --tiny shows that everything runs")
    began = time.monotonic()
    rows: list[Row] = []
    spent: dict[str, float] = {}

    def told(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="qrpo-gpu-") as scratch:
        models = Path(scratch) / "models"
        os.environ["QRPO_RANDOM_MODELS"] = str(models)
        names = ("tiny",) if asked.tiny else ("135m", "1b")
        reason = run(
            [sys.executable, str(HERE / "_random_model.py"), str(models), *names], folder / "models.log", 90
        )
        told(f"models: {reason or 'written'}")
        for name in asked.parts:
            part, left = PARTS[name], 60 * asked.minutes - (time.monotonic() - began)
            if left < 5:
                rows.append(Row(name, reason=f"not begun: the {asked.minutes:g} minutes were over"))
                continue
            seconds = min(left, part.seconds if not asked.tiny else 600)
            told(f"{name}: at most {seconds:.0f} s")
            started = time.monotonic()
            fresh = measure(name, part, asked, folder, seconds)
            spent[name] = round(time.monotonic() - started, 1)
            for row in fresh:
                told(f"  {row.line(not asked.tiny)}")
            rows += fresh
    table = markdown(rows, not asked.tiny)
    if asked.tiny:
        table = f"Tiny shapes: everything runs; no number means anything.\n\n{table}"
    (folder / "table.md").write_text(table, encoding="utf-8")
    result = head | {"seconds": spent, "rows": [row.told() for row in rows]}
    publish(
        result,
        folder / "table.json",
        shown=f"\n{table}\nfiles: {folder.name}, {time.monotonic() - began:.0f} s",
    )
    sys.exit(any(row.reason for row in rows))


if __name__ == "__main__":
    main()
