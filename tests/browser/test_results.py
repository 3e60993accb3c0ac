"""What a person finds of a finished run in a real browser: its log, result and report, and other runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.artifacts import open_artifact

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

#: How long a run, or a page of a loaded machine, may take, in milliseconds.
PATIENCE = 300_000


def finished_run(service: Any) -> str:
    """The id of a run of `align`, started here and completed."""
    align = service.ask("GET", "/deployments/name/align/align")
    run = service.ask("POST", f"/deployments/{align['id']}/create_flow_run", parameters=align["parameters"])
    deadline = time.monotonic() + PATIENCE / 1000
    while (found := service.ask("GET", f"/flow_runs/{run['id']}"))["state"]["type"] != "COMPLETED":
        assert time.monotonic() < deadline, found["state"]
        assert found["state"]["type"] not in ("FAILED", "CRASHED"), found["state"]
        time.sleep(1)
    return str(run["id"])


def test_from_the_page_of_a_run_to_its_report(
    service: Any, page: Any, picture: Callable[[str], None]
) -> None:
    from playwright.sync_api import expect

    page.set_default_timeout(PATIENCE)
    page.goto(f"{service.url}/v2/runs/flow-run/{finished_run(service)}")
    # The run that a person opens has the lines of its parts in its log.
    page.get_by_role("tab", name="Logs").click()
    expect(
        page.get_by_text(re.compile(r"sample references +(cached, )?\d+ rows (computed|reused)")).first
    ).to_be_visible(timeout=PATIENCE)

    open_artifact(page, "result")
    expect(page.get_by_text(re.compile("^Judge brevity, which training never saw:")).first).to_be_visible(
        timeout=PATIENCE
    )
    expect(page.get_by_role("heading", name="Example completions")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("link", name="Open the report").click()
    page.wait_for_url(re.compile("/qrpo/report/[0-9a-f]{32}$"))
    expect(page.get_by_text("QRPO report: tiny")).to_be_visible(timeout=PATIENCE)
    picture("report")
    drawn = page.evaluate("[...document.querySelectorAll('svg')].every(each => each.clientWidth > 100)")
    assert drawn

    page.goto(f"{service.url}/qrpo/runs")
    expect(page.get_by_role("link", name="open").first).to_be_visible(timeout=PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 420})
    picture("runs")
    page.get_by_role("link", name="open").first.click()
    expect(page.get_by_text("QRPO report: tiny")).to_be_visible(timeout=PATIENCE)
