"""`qrpo budget` and the flow `top_up` on a real server: what they buy, in which steps, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from flows.service.server import PrefectServer
from qrpo_core.common.schemas import REWARDS
from qrpo_core.config import Experiment
from qrpo_core.config.reading import load_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline.budgets import Scored, for_precision
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.flows.small import call, small

pytestmark = pytest.mark.slow


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, server: PrefectServer) -> Path:
    """An experiment whose references are drawn and scored, 4 a prompt."""
    from flows.precompute import precompute

    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    precompute(load_experiment(path))
    return path


def drawn(experiment: Experiment) -> Counter[str]:
    """References of each prompt, counted from the store."""
    workspace = Workspace(experiment)
    samples, _ = reference_steps(workspace)
    rows: Counter[str] = Counter()
    for block in workspace.blocks.committed(samples.recipe):
        for row_range in block.ranges:
            rows[row_range.key] += row_range.count
    return rows


def top_up(experiment: Experiment) -> int:
    """References that one run of the flow drew; as many were scored."""
    from flows.top_up import top_up as flow

    rows: Counter[str] = Counter()
    for stage in flow(experiment):
        rows[stage.stage] += stage.computed
    assert rows["sample references"] == rows["annotate references"]
    return rows["sample references"]


def test_an_applied_budget_is_drawn_in_bounded_steps_and_no_row_beside_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiment(file)
    before = drawn(experiment)
    assert set(before.values()) == {4}
    stored = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    assert call("budget", file, "--add", 30) == 0
    assert "Not applied" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()} == stored

    assert call("budget", file, "--add", 30, "--apply") == 0
    assert "30 further references" in capsys.readouterr().out
    steps = {stage.stage: stage for stage in plan(Workspace(experiment))}
    assert steps["sample references"].missing == steps["annotate references"].missing == 30

    bounded = load_experiment(file, ["top_up.rows_per_run=12"])
    portions = []
    while rows := top_up(bounded):
        assert rows <= 12
        portions.append(rows)
        assert len(portions) < 30
    assert sum(portions) == 30
    assert len(portions) >= 3
    after = drawn(experiment)
    assert after.keys() == before.keys()
    assert sum((after - before).values()) == 30
    assert not any(stage.missing for stage in plan(Workspace(experiment))[:3])

    assert call("budget", file, "--clear") == 0
    assert drawn(experiment) == after


def test_a_precision_is_reached_where_it_can_be_and_then_nothing_is_left(file: Path) -> None:
    target = load_experiment(file, ["top_up.standard_error=0.12", "top_up.max_references=24"])
    while top_up(target):
        pass
    workspace = Workspace(target)
    _, rewards = reference_steps(workspace)
    scored = Scored.of(workspace.blocks.read(rewards.recipe, rewards.wanted, REWARDS))
    sizes = dict(zip(scored.prompts, scored.sizes.tolist(), strict=True))
    short = for_precision(scored, 0.12, 24)
    assert all(sizes[prompt] == 24 for prompt in short), "below the limit, yet less certain than asked for"
    assert max(sizes.values()) > 4
    assert all(not stage.missing for stage in plan(workspace)[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "0"], "--add 0"),
        (["--precision", "0.7"], "0.7"),
        (["--add", "5", "--most", "0"], "--most 0"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call("budget", file, *arguments, "--apply") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert set(drawn(load_experiment(file)).values()) == {4}
