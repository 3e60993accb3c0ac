"""Benchmarks in the whole flow: AlpacaEval with a judge on loopback, and problems in LeetCode's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.result import report_path, result_lines, results
from qrpo_core.maintenance.gc import garbage
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.core.rewards.alpaca_judge import (
    PYTHON,
    needs_package,
    preferring,
    write_baseline,
    write_gamed,
)
from tests.core.rewards.code_problems import leetcode, needs_bwrap
from tests.core.rewards.judge_server import Judge
from tests.flows.small import small

pytestmark = pytest.mark.slow

COUNT = 24


def write_problems(path: Path, count: int) -> None:
    checks = (f"def check(candidate):\n    assert candidate(1) == {n + 1}" for n in range(count))
    rows = [{"query": f"Add {n}", **json.loads(leetcode(check))} for n, check in enumerate(checks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def code(folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "prompts": {
            "kind": "file",
            "path": str(folder / "problems.jsonl"),
            "prompt_field": "query",
            "ground_truth_fields": ["prompt", "entry_point", "test"],
        },
        "reward": {"kind": "code", "code": {"format": "leetcode"}},
        **fields,
    }


def alpaca(folder: Path, url: str, **fields: Any) -> dict[str, Any]:
    return {
        "prompts": {
            "kind": "file",
            "path": str(folder / "baseline.json"),
            "prompt_field": "instruction",
            "ground_truth_fields": ["output", "generator", "dataset"],
        },
        "reward": {
            "kind": "alpaca_eval",
            "alpaca_eval": {"url": url, "model": "local", "retry_seconds": 0, "python": PYTHON},
        },
        "temperature": 0.7,
        "max_new_tokens": 6,
        **fields,
    }


def experiment(model: Path, folder: Path, benchmarks: dict[str, Any]) -> Experiment:
    settings = small(model, folder / "store") | {
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"samples_per_prompt": 1, "resamples": 200, "benchmarks": benchmarks},
    }
    return parse_experiment(settings)


def align(wanted: Experiment) -> dict[str, Any]:
    from flows.align import align as flow

    return {stage.stage: stage for stage in flow(wanted)}


@pytest.fixture
def judge(tmp_path: Path) -> Iterator[Judge]:
    """Prefers the longer output; files of prompts are beside the store."""

    def share(first: str, second: str) -> float:
        return 1 / (1 + 2 ** (len(second) - len(first)))

    write_baseline(tmp_path / "baseline.json", COUNT)
    write_problems(tmp_path / "problems.jsonl", 5)
    with Judge(preferring(share)).running() as found:
        yield found


@needs_package
@needs_bwrap
def test_both_benchmarks_are_sampled_scored_and_reported_and_cached(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gamed(tmp_path / "hub", COUNT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    both = {"leetcode": code(tmp_path), "alpaca": alpaca(tmp_path, judge.url)}
    wanted = experiment(tiny_model, tmp_path, both)
    workspace = Workspace(wanted)
    planned = {stage.stage: stage.missing for stage in plan(workspace)}
    first = align(wanted)
    stages = [name for name in first if "benchmark" in name]
    assert sorted(stages) == sorted(name for name in planned if "benchmark" in name)
    assert {name: first[name].computed for name in stages} == {name: planned[name] for name in stages}
    assert first["annotate benchmark alpaca, after"].computed == COUNT

    made = results(workspace)
    found = made.benchmarks["alpaca"]
    assert set(found.alpaca_eval["before"]) >= {"win_rate", "length_controlled_winrate", "n_total"}
    # the package's win rate is the mean of the stored preferences, by another road
    assert found.alpaca_eval["after"]["win_rate"] == pytest.approx(100 * found.after.reward.value)
    assert found.alpaca_eval["after"]["n_total"] == COUNT
    assert made.benchmarks["leetcode"].solved_after.value == 0  # random tokens are no program
    text = "\n".join(result_lines(workspace))
    assert "alpaca: Length-controlled win rate" in text
    assert "leetcode: Solved" in text
    assert "alpaca: Win rate" in report_path(workspace).read_text(encoding="utf-8")

    steps = stored_steps(workspace)
    end = steps.after(steps.last())
    artifact = workspace.artifacts.get(next(e.result for e in end.benchmarks if e.name == "alpaca"))
    rows = json.loads(workspace.artifacts.read(artifact, "model_outputs_after.json"))
    assert [row["instruction"] for row in rows] == [f"Say {number}" for number in range(COUNT)]
    assert set(rows[0]) == {"dataset", "instruction", "output", "generator"}

    asked = len(judge.asked)
    again = align(wanted)
    assert all(not stage.computed for stage in again.values())
    assert len(judge.asked) == asked
    unused = garbage([Workspace(wanted)], datetime.now(UTC) + timedelta(days=1)).garbage
    assert [each.what for each in unused if "benchmark" in each.what or "reward" in each.what] == []


@needs_package
def test_an_outage_keeps_rows_and_the_next_run_asks_for_the_others(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, judge: Judge
) -> None:
    away = True
    answer = preferring(lambda first, second: 0.4)

    def sometimes(body: dict[str, Any], turn: int) -> Any:
        failed = away and '"instruction": """Say 1' in str(body["messages"][-1]["content"])  # 1 and 10 to 19
        return (503, {}, "busy") if failed else answer(body, turn)

    with Judge(sometimes).running() as flaky:
        own = {"alpaca": alpaca(tmp_path, flaky.url, length_controlled=False)}
        wanted = experiment(tiny_model, tmp_path, own)
        align(wanted)
        workspace = Workspace(wanted)
        assert results(workspace).benchmarks["alpaca"].after.not_ok["endpoint_error"] == 11
        away = False
        again = align(wanted)
        assert again["annotate benchmark alpaca, after"].computed == 11
        assert again["annotate benchmark alpaca, after"].reused == COUNT - 11
        assert not again["sample benchmark alpaca, after"].computed
        found = results(Workspace(wanted)).benchmarks["alpaca"]
        assert found.after.not_ok["endpoint_error"] == 0
        assert found.prompts == COUNT


def test_what_a_benchmark_lacks_ends_the_run_before_anything_is_computed(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    import venv

    write_baseline(tmp_path / "baseline.json", 3)
    venv.create(tmp_path / "empty", with_pip=False)
    judged = alpaca(tmp_path, "http://127.0.0.1:9/v1")
    judged["reward"]["alpaca_eval"]["python"] = str(tmp_path / "empty")
    wanted = experiment(tiny_model, tmp_path, {"alpaca": judged})
    with pytest.raises(ConfigError, match="needs the package alpaca-eval") as found:
        align(wanted)
    assert "evaluation.benchmarks.alpaca" in str(found.value)
    assert not list((tmp_path / "store").rglob("*.parquet"))
