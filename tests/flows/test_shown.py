"""What the UI shows of a run: its names, plan, stages, result; and that showing it never fails a run."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.service.pages import with_pages
from flows.service.server import PrefectServer
from flows.service.submissions import watch
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.result import report_path
from qrpo_core.pipeline.run_ledger import RunLedger
from qrpo_core.pipeline.workspace import Workspace
from tasks.page_links import page_address
from tasks.report_examples import fenced
from tasks.report_figures import figures
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


def test_no_text_of_a_completion_leaves_its_fence() -> None:
    for text in ("plain", "```\n# title", "a ```` b", "", "`" * 20):
        first, *middle, last = fenced(text).split("\n")
        assert first == f"{last}text"
        assert set(last) == {"`"}
        assert last not in "\n".join(middle)
        assert "\n".join(middle) == (text or "(empty)")
    assert len(fenced("x" * 10_000)) < 1000


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

    judges = {"brevity": {"kind": "length", "max_words": 2}}
    evaluated = {"samples_per_prompt": 2, "resamples": 200, "judges": judges}
    wanted = asked(tiny_model, tmp_path / "store", evaluation=evaluated)
    align(wanted)
    server.flush()
    facts = f"small · {tiny_model.name} · template ×20 · n=4 · qrpo beta=0.1 lr=0.001"
    names = [f"{flow} {facts}" for flow in ("align", "train", "evaluate")]
    assert sorted(run["name"] for run in read("flow_runs", name=names)) == sorted(names)

    shown_there = of_run(f"align {facts}")
    assert {"plan", "stages", "evaluation", "result"} <= set(shown_there)
    plan = shown_there["plan"]["data"]
    assert re.search(r"^\| sample references \| 0 \| 60 \|", plan, re.M)
    assert "To compute: " in plan
    assert f"Store: {tmp_path / 'store'}" in plan

    stages = shown_there["stages"]["data"]
    assert re.search(r'"score reference log-probs",.*?"GPUs": 1, "cost, EUR": "0\.\d+"', stages)
    assert re.search(r'"all of this run",.*?"cost, EUR": "0\.\d+"', stages)

    result = shown_there["result"]["data"]
    assert result.count("](data:image/svg+xml;base64,") == 5
    assert len(result) < 500_000
    assert f"Report: `{report_path(Workspace(wanted))}`" in result
    assert re.search(rf"Policy: `{re.escape(str(tmp_path))}/store/artifacts/train/\S+/policy`", result)

    (run,) = (ledger := RunLedger(wanted.store)).runs
    report = run.report
    assert report is not None
    pages = TestClient(with_pages(PlainTextResponse(""), [str(tmp_path / "store")]))
    assert f"  1  {ledger.place(run.train, 'policy')}" in pages.get("/qrpo/runs").text
    assert f"[Open the report]({page_address(report)})" in result
    assert "Judge brevity, which training never saw: " in result
    examples = result.partition("### Example completions")[2]
    assert re.search(r"^\*before, reward [\d.]+\*\n\n```text\n", examples, re.M)
    assert f"`qrpo show {report.key[:8]} --store {tmp_path / 'store'}`" in result

    # The run that a person opens has the lines of the runs in it.
    (opened,) = read("flow_runs", name=[f"align {facts}"])
    lines = "\n".join(each["message"] for each in read("logs", flow_run_id=[opened["id"]]))
    for stage in ("sample references", "train policy", "write report"):
        assert re.search(rf"^  {stage} +\d+ \w+ computed", lines, re.M), lines
    said: list[str] = []
    watch(server.url, UUID(opened["id"]), said.append)  # as `qrpo submit --watch`: each line once
    assert len([line for line in said if re.match("  (train policy|write report) ", line)]) == 2, said
    # So are the warnings of the runs in it, once each.
    warned = [each for each in read("logs", flow_run_id=[opened["id"]]) if each["level"] == logging.WARNING]
    told = [each["message"] for each in warned]
    assert any("completions are cut by the length limit" in each for each in told)
    assert len(told) == len(set(told))
    assert [line for line in said if line in told] == told
    parts = [each["id"] for name in names[1:] for each in read("flow_runs", name=[name])]
    of_parts = [each for each in read("logs", flow_run_id=parts) if each["name"].startswith("qrpo.")]
    assert {each["message"] for each in of_parts} <= set(said)
    assert {each["message"] for each in of_parts if each["level"] == logging.WARNING} <= set(told)

    # What `align` shows, the runs in it do not show again.
    inside = of_run(f"evaluate {facts}")
    assert "stages" in inside
    assert not {"plan", "result", "evaluation"} & set(inside)
    progress = of_run(f"evaluate {facts}")["score policy log-probs, after"]["description"]
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
    from tasks import progress, ui_artifacts

    def away(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("the server is away")

    for module, name in (
        (ui_artifacts, "create_markdown_artifact"),
        (ui_artifacts, "create_table_artifact"),
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
