"""What the UI shows of a run: its names, plan, stages, result; and that showing it never fails a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows.server import PrefectServer
from qrpo_core.config import Experiment
from qrpo_core.experiments import parse_experiment
from qrpo_core.show import report_path
from qrpo_core.steps.workspace import Workspace
from tasks.figures import figures
from tests.flows.small import small

REPORT = """<h2>Figures</h2>
<figure>
<h3>Rewards &amp; [more]</h3>
<svg role="img" aria-label="x" viewBox="0 0 1 1"><path stroke="var(--after, #0072b2)"/></svg>
<figcaption>Good: &lt; 1.</figcaption>
</figure>"""


def test_the_figures_of_a_report_are_images_of_their_own() -> None:
    import base64

    (found,) = figures(REPORT)
    assert (found.title, found.caption) == ("Rewards & [more]", "Good: < 1.")
    label, data = found.image.split("](data:image/svg+xml;base64,")
    assert label == "![Rewards & more"
    svg = base64.b64decode(data.removesuffix(")")).decode()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" role="img"')
    assert 'stroke="#0072b2"' in svg
    assert figures("<p>no figure</p>") == []


def asked(model: Path, store: Path, **sections: Any) -> Experiment:
    settings = small(model, store) | {
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {"samples_per_prompt": 2, "resamples": 200},
        "service": {"gpu_hour_price": 3.6, "currency": "EUR"},
    }
    return parse_experiment({"name": "small"} | settings | sections)


def read(kind: str, **wanted: list[str]) -> list[Any]:
    """What the server has of a kind, `artifacts` or `flow_runs`, whose fields are among the values wanted."""
    from prefect.client.orchestration import get_client

    asked = {kind: {field: {"any_": values} for field, values in wanted.items()}}
    with get_client(sync_client=True) as client:
        return list(client.request("POST", f"/{kind}/filter", json=asked).json())


def of_run(name: str) -> dict[str, Any]:
    """The artifacts of the one run with this name, by key; progress by the first words of its description."""
    (run,) = read("flow_runs", name=[name])
    found = read("artifacts", flow_run_id=[run["id"]])
    return {each["key"] or str(each["description"]).partition(":")[0]: each for each in found}


@pytest.mark.slow
def test_a_run_shows_its_plan_its_stages_and_its_result(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.align import align

    wanted = asked(tiny_model, tmp_path / "store")
    align(wanted)
    server.settle()
    facts = f"small · {tiny_model.name} · template ×20 · n=4"
    names = [f"{flow} {facts}" for flow in ("align", "train", "evaluate")]
    assert sorted(run["name"] for run in read("flow_runs", name=names)) == sorted(names)

    shown_there = of_run(f"align {facts}")
    assert {"plan", "stages", "evaluation", "result"} <= set(shown_there)
    plan = shown_there["plan"]["data"]
    assert re.search(r"^\| sample references \| 0 \| 60 \|", plan, re.M)
    assert "To compute: " in plan
    assert f"Store: {tmp_path / 'store'}" in plan

    stages = shown_there["stages"]["data"]
    assert re.search(r'"reference log-probs",.*?"GPUs": 1, "cost, EUR": "0\.\d+"', stages)
    assert re.search(r'"all of this run",.*?"cost, EUR": "0\.\d+"', stages)

    result = shown_there["result"]["data"]
    assert result.count("](data:image/svg+xml;base64,") == 5
    assert len(result) < 500_000
    assert f"Report: `{report_path(Workspace(wanted))}`" in result
    assert re.search(rf"Policy: `{re.escape(str(tmp_path))}/store/artifacts/train/\S+/policy`", result)

    # What `align` shows, the runs in it do not show again.
    inside = of_run(f"evaluate {facts}")
    assert "stages" in inside
    assert not {"plan", "result", "evaluation"} & set(inside)
    progress = of_run(f"evaluate {facts}")["policy log-probs, after"]["description"]
    assert re.search(r": 10 of 10 rows, [\d.]+ rows/s in [\d.]+ s, 0\.\d+ EUR$", progress)


@pytest.mark.slow
def test_what_cannot_be_shown_is_a_warning(
    server: PrefectServer,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows.top_up import top_up
    from tasks import progress, tables

    def away(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("the server is away")

    for module, name in (
        (tables, "create_markdown_artifact"),
        (tables, "create_table_artifact"),
        (progress, "create_progress_artifact"),
        (progress, "update_progress_artifact"),
    ):
        monkeypatch.setattr(module, name, away)
    from flows.precompute import precompute

    wanted = asked(tiny_model, tmp_path / "store")
    assert sum(stage.computed for stage in precompute(wanted)) > 60
    told = "the UI does not show everything: ConnectionError: the server is away"
    before = caplog.text.count(told)
    assert before >= 4  # the stages, and the progress of three of them
    assert top_up(wanted) == []  # nothing is missing
    assert caplog.text.count(told) == before + 2  # plan and stages
