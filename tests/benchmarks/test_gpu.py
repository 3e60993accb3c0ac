"""The GPU benchmark runs anywhere with tiny shapes, and says what it could not measure."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_table")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_gpu_rows")


def test_a_row_shows_its_goal_and_whether_it_is_met(rows: ModuleType) -> None:
    lines = [
        rows.Row("steps", "30 / 20 tokens/s", 1.5, least=1.5),
        rows.Row("steps", "28 / 20 tokens/s", 1.4, least=1.5),
        rows.Row("peak", "2 / 4 GB", 0.5, most=0.5),
        rows.Row("peak", "3 / 4 GB", 0.75, most=0.5),
        rows.Row("price", "9 / 10", 0.9),
        rows.Row("vllm", reason="no | vLLM"),
    ]
    assert rows.markdown(lines).splitlines()[2:] == [
        "| steps | 30 / 20 tokens/s | >= 1.5 | 1.50 met |",
        "| steps | 28 / 20 tokens/s | >= 1.5 | 1.40 **missed** |",
        "| peak | 2 / 4 GB | <= 0.5 | 0.50 met |",
        "| peak | 3 / 4 GB | <= 0.5 | 0.75 **missed** |",
        "| price | 9 / 10 |  | 0.90 |",
        "| vllm | not measured: no / vLLM |  | |",
    ]
    assert "met" not in rows.markdown(lines[:4], judged=False)


def test_a_part_ends_with_a_reason(table: ModuleType, tmp_path: Path) -> None:
    """At its limit with everything that it started, and by an error with its last line."""
    log = tmp_path / "log"
    assert table.run(["sh", "-c", "exit 0"], log, 60) is None
    assert table.run(["sh", "-c", "echo first; echo no TRL >&2; exit 3"], log, 60) == "no TRL"
    assert table.run(["sh", "-c", "exit 3"], log, 60) == "exit status 3"
    child = tmp_path / "child"
    started = ["sh", "-c", f"sleep 600 & echo $! > {child}; wait"]
    assert table.run(started, log, 2) == "ran past its 2 seconds"
    for _ in range(100):
        if not alive(int(child.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(child.read_text()))


def test_a_checkout_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    result = importlib.import_module("_result")
    monkeypatch.setattr(result, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("QRPO_COMMIT", raising=False)
    assert result.commit() == "unknown"
    (tmp_path / "QRPO_COMMIT").write_text("abc\n")
    assert result.commit() == "abc"
    monkeypatch.setenv("QRPO_COMMIT", "def")
    assert result.commit() == "def"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_parts_run_with_tiny_shapes(tmp_path: Path) -> None:
    """TRL is in no environment of the tests: it shows as a line with the reason, and the others run."""
    parts = ["training_1b", "reference_logprobs", "sampling", "head", "logprob_error"]
    done = run_tiny(tmp_path, parts)
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    told = json.loads((tmp_path / "table.json").read_text())
    missing = [row for row in told["rows"] if row["not_measured"]]
    assert [row["what"] for row in missing] == ["training_1b: trl_dpo"], done.stdout
    assert "No module named 'trl'" in missing[0]["not_measured"]
    assert done.returncode == 1
    assert sorted(told["seconds"]) == sorted(parts)
    for what in ("DPO, tiny: steps", "QRPO, tiny: passes of a step", "reference log-probs", "generate"):
        assert what in table
    for name in (*parts, "table"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"benchmark", "hardware", "commit", "command"} <= found.keys()
        assert {"cpu", "gpu", "torch"} <= found["hardware"].keys()
    runs = json.loads((tmp_path / "training_1b.json").read_text())["runs"]
    for name in ("ours_dpo", "ours_qrpo"):
        run = runs[name]
        assert len(run["seconds"]) == len(run["losses"]) == len(run["passes"]) == 3
        assert run["tokens_per_second"] > 0
        assert set(run["passes"]) == {1}
    # The reference log-probs are the training's: the policy starts as the reference.
    assert runs["ours_dpo"]["losses"][0] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_the_part_vllm_runs_with_tiny_shapes(tmp_path: Path) -> None:
    done = run_tiny(tmp_path, ["vllm"])
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "vllm.json").read_text())
    assert found["equal_a_second_time"] == 1.0
    tokens = found["tokens_a_round"]
    assert tokens["ours"] == tokens["unseeded"] == tokens["seeded"] == [16]


def run_tiny(folder: Path, parts: list[str]) -> subprocess.CompletedProcess[str]:
    """benchmarks/gpu.sh --tiny with these parts, by this interpreter."""
    environment = os.environ | {"PYTHON": sys.executable, "TRL_PYTHON": sys.executable}
    return subprocess.run(
        ["benchmarks/gpu.sh", "--tiny", "--minutes", "20", "--output", str(folder), "--parts", *parts],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for counts as ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
