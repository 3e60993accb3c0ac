"""`qrpo pool` on a real server: the pool report of a small pool, its judges' rows, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.service.server import PrefectServer
from qrpo_core.config.reading import load_experiment
from qrpo_core.inspection.pool_report import found_report, plan_line
from qrpo_core.maintenance.in_use import stored_recipes, used_recipes
from qrpo_core.pipeline.pool_report import stored_report
from qrpo_core.pipeline.workspace import Workspace
from tests.flows.small import call, small
from tests.flows.test_shown import read

pytestmark = pytest.mark.slow

#: The reward counts letters; one judge sees the same up to 6 and no more, the other fails on every third row.
REWARDS = """
def letters(batch):
    return [float(len(set(row.completion))) for row in batch]

def few(batch):
    return [min(6.0, len(set(row.completion))) for row in batch]

def fails(batch):
    lengths = [len(row.completion) for row in batch]
    return [float(each) if each % 3 else float("nan") for each in lengths]
"""


def python(folder: Path, name: str) -> dict[str, Any]:
    return {"kind": "python", "python": {"function": f"{folder / 'rewards.py'}:{name}"}}


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, server: PrefectServer) -> Path:
    """An experiment whose pool is in the store: 15 training prompts with 8 references each."""
    from flows.precompute import precompute

    folder = tmp_path_factory.mktemp("pool")
    (folder / "rewards.py").write_text(REWARDS)
    settings = small(tiny_model, folder / "store") | {"name": "pooled", "reward": python(folder, "letters")}
    settings["sampling"] |= {"references_per_prompt": 8}
    settings["evaluation"] = {"judges": {name: python(folder, name) for name in ("few", "fails")}}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert "none yet" in plan_line(Workspace(load_experiment(path)))
    precompute(load_experiment(path))
    return path


def pool_report(path: Path, *overrides: str) -> dict[str, tuple[int, int]]:
    """Reused and computed rows of each stage of one run of the flow."""
    from flows.pool_report import pool_report as flow

    return {each.stage: (each.reused, each.computed) for each in flow(load_experiment(path, overrides))}


def test_the_report_is_made_once_and_a_larger_sample_keeps_the_scored_rows(pooled: Path) -> None:
    few = ("pool_report.prompts=5", "pool_report.completions_per_prompt=4")
    assert pool_report(pooled, *few)["judge few, pool"] == (0, 20)
    more = pool_report(pooled)
    total = sum(more["judge few, pool"])
    assert more["judge few, pool"][0] == 20
    assert more["write pool report"] == (0, 1)
    assert set(pool_report(pooled).values()) == {(total, 0), (1, 0)}
    experiment = load_experiment(pooled)
    made = found_report(Workspace(experiment))
    assert made is not None
    report = stored_report(made)
    assert (report.spread.prompts, report.spread.references) == (15, 120)
    assert report.judges["few"].asked == total
    agreement = report.judges["few"].agreement
    assert agreement is not None
    # It never contradicts the reward, and it ties where both have 6 letters or more.
    assert agreement.agreement.value == pytest.approx(1 - agreement.ties / 2)
    failing = report.judges["fails"]
    assert failing.statuses.keys() == {"parse_error"}
    assert failing.agreement is not None
    assert failing.agreement.rows <= failing.asked - failing.statuses["parse_error"]
    assert report.judges.keys() == {"few", "fails"}
    shown = read("artifacts", key=["pool-report"])
    assert shown
    for each in shown:
        assert each["data"].startswith("## Pool of pooled")
        assert each["data"].count("data:image/svg+xml") == 3


def test_the_command_prints_the_report_and_writes_nothing_where_it_is_made(
    pooled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool_report(pooled)
    stored = {path: path.read_bytes() for path in (pooled.parent / "store").rglob("*") if path.is_file()}
    assert call("pool", pooled, "--out", tmp_path / "pool.html") == 0
    text = capsys.readouterr().out
    assert text.startswith("Pool report of pooled. Judge f")
    assert "Judge few by quantile of the reward" in text
    page = (tmp_path / "pool.html").read_text()
    assert len(re.findall("<figure>", page)) == 3
    assert call("pool", pooled, "--json") == 0
    assert json.loads(capsys.readouterr().out)["judges"].keys() == {"few", "fails"}
    assert call("plan", pooled) == 0
    assert "Pool report: Judge f" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (pooled.parent / "store").rglob("*") if p.is_file()} == stored


def test_gc_keeps_the_report_and_the_scores(pooled: Path) -> None:
    pool_report(pooled)
    workspace = Workspace(load_experiment(pooled))
    stored = stored_recipes(workspace)
    kept = used_recipes(workspace, stored).kept
    made = found_report(workspace)
    assert made is not None
    assert made.key in kept
    assert {each.key for each in stored if each.step == "reward"} <= kept


def test_without_a_judge_the_other_parts_are_shown(pooled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("--set", "evaluation.judges={}")
    assert call("plan", pooled, *alone) == 0
    assert "Pool report: not made yet; `qrpo pool EXPERIMENT`" in capsys.readouterr().out
    pool_report(pooled, "evaluation.judges={}")
    assert call("pool", pooled, *alone) == 0
    text = capsys.readouterr().out
    assert "No judge has scored the pool" in text
    assert "Standard error of a quantile" in text
    # The baselines have no quantiles, so no target has a sign to be right about.
    dpo = ("evaluation.judges={}", "objective.kind=dpo", "training_data.mode=pairs")
    assert pool_report(pooled, *dpo)["write pool report"] == (0, 1)
    made = found_report(Workspace(load_experiment(pooled, dpo)))
    assert made is not None
    assert stored_report(made).more.signs is None


def test_bad_input_is_one_line_and_exit_status_2(
    pooled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = json.dumps({"same": python(pooled.parent, "letters")})
    elsewhere = f"store.path={tmp_path}"
    more = "sampling.references_per_prompt=9"
    for override, words in (
        (f"evaluation.judges={same}", "the judge is the reward itself"),
        (elsewhere, "--flow precompute"),
        (more, "15 rewards of the pool are not in the store"),
        ("pool_report.completions_per_prompt=1", "greater than or equal to 2"),
    ):
        assert call("pool", pooled, "--set", override) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
