"""What a person does in Prefect's UI, in a real browser: start a run from its form, watch it, read it.

In the order of the file: the runs of later tests find what earlier ones put into the store.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import count_rows
from tests.browser.artifacts import card, open_artifact

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

BUDGET = "sampling.references_per_prompt (Optional)"
#: How long a run of the tiny experiment may take, in milliseconds, on a busy machine.
PATIENCE = 150_000


def open_form(page: Any, service: Any) -> None:
    """From the first page to the form of `align`, by its links and buttons."""
    page.goto(service.url)
    page.get_by_role("link", name="Deployments", exact=True).first.click()
    page.get_by_role("link", name="align", exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_label(BUDGET).wait_for()


def start(page: Any, budget: int) -> None:
    """Fill in the budget and submit, again where SQLite was busy, as a person does; open the run's page."""
    page.get_by_label(BUDGET).fill(str(budget))
    for _ in range(5):
        with page.expect_response(re.compile("/create_flow_run$"), timeout=PATIENCE) as answer:
            page.get_by_role("button", name="Submit").click()
        if answer.value.status != 503:  # "Unknown error while creating flow run." is what the page says then
            break
    page.locator(f"a[href*='{answer.value.json()['id']}']").first.click()
    page.wait_for_url(re.compile("/flow-run/"))
    page.mouse.move(0, 0)  # a message under the mouse does not go away


def name_of(flow: str, budget: int) -> str:
    trained = " · qrpo beta=0.1 lr=0.01" if flow in ("align", "train", "evaluate") else ""
    return f"{flow} tiny · tiny-llama · template ×24 · n={budget}{trained}"


def test_the_form_explains_itself(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    open_form(page, service)
    for text in (
        "A preset or a run in the store, or a YAML file of the worker's checkout.",
        "The pre-computation budget: reference completions for each training prompt.",
        "Peak of the schedule.",
        "A whole experiment, in place of based_on.",
    ):
        assert page.get_by_text(text).first.is_visible()
    assert page.get_by_label("based_on").input_value() == str(service.folder / "tiny.yaml")
    assert page.get_by_label(BUDGET).input_value() == ""
    # As far down as the button, it is a page and a half on a laptop's screen; every setting would be twenty.
    height = page.evaluate("document.querySelector('main').scrollHeight")
    assert height < 2000
    page.set_viewport_size({"width": 1280, "height": height})
    picture("form")
    page.get_by_role("tab", name="Experiment", exact=True).click()
    for text in ("The reference model: training starts from it.", "Price of one GPU for an hour"):
        page.get_by_text(text).first.wait_for()
    assert not page.get_by_text(re.compile(r"^\w+Config")).count()  # no class's name is a heading


def test_align_with_another_budget(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    from playwright.sync_api import expect

    open_form(page, service)
    page.get_by_label(BUDGET).fill("6")
    page.get_by_label(BUDGET).evaluate("field => field.scrollIntoView({block: 'center'})")
    picture("form-budget")
    start(page, 6)
    expect(page.get_by_text("Running", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text(name_of("align", 6), exact=True).first).to_be_visible(timeout=PATIENCE)
    part = page.get_by_role("link", name=re.compile("^precompute")).first
    while not part.is_visible():  # by itself the list is asked for anew too seldom for a run of seconds
        page.reload()
        page.get_by_role("tab", name="Subflow Runs").click()
        page.wait_for_timeout(1000)
    picture("running")
    # Nothing is pressed: the page follows the run, and the parts it lists, by itself.
    expect(page.get_by_text("Running", exact=True)).to_have_count(0, timeout=PATIENCE)
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=PATIENCE)
    page.reload()  # the graph as one finds it later: the whole run
    page.get_by_role("tab", name="Artifacts").click()
    for key in ("plan", "stages", "evaluation", "result"):
        expect(card(page, key)).to_be_visible(timeout=PATIENCE)
    picture("run-completed")

    open_artifact(page, "result")
    expect(page.get_by_text(re.compile("^Mean reward")).first).to_be_visible()
    page.get_by_role("heading", name="Rewards before and after").scroll_into_view_if_needed()
    drawn = page.evaluate("[...document.querySelectorAll('img')].map(image => image.naturalWidth)")
    assert len(drawn) == 5
    assert all(drawn)
    picture("result")

    # The form's budget is the run's: six references of every prompt are in the store.
    changed = service.experiment["sampling"] | {"references_per_prompt": 6}
    samples, *_ = reference_steps(
        Workspace(Experiment.model_validate(service.experiment | {"sampling": changed}))
    )
    committed = samples.workspace.blocks.committed(samples.recipe)
    row_ranges = [
        row_range for block in committed for row_range in block.ranges if row_range.key in samples.wanted
    ]
    assert (
        sum(row_range.count for row_range in row_ranges)
        == count_rows(samples.wanted)
        == 6 * len(samples.wanted)
        > 0
    )


def test_the_stages_say_rows_rates_and_cost(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    from playwright.sync_api import expect

    open_run_again(page, service, 6)
    open_artifact(page, "stages")
    expect(page.get_by_role("link", name=name_of("align", 6))).to_be_visible()
    for text in ("all of this run", "sample references", "rows/s", "cost, EUR"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    picture("stages")
    open_run_again(page, service, 6)
    open_artifact(page, "plan")
    expect(page.get_by_role("cell", name="sample references")).to_be_visible()
    picture("plan")


def open_run_again(page: Any, service: Any, budget: int) -> None:
    page.goto(f"{service.url}/v2/runs")
    page.get_by_role("link", name=name_of("align", budget), exact=True).first.click()
    page.wait_for_url(re.compile("/flow-run/"))


def finished(service: Any, flow: str, runs: int) -> Any:
    """The newest run of a flow, once it has had so many runs and nothing runs any more."""
    newest = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 100}
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        found = service.ask("POST", "/flow_runs/filter", **newest)
        busy = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}}}
        if len(found) == runs and not service.ask("POST", "/flow_runs/count", **busy):
            return found[0]
        time.sleep(1)
    raise AssertionError(f"{flow}: {len(found)} runs")


def open_graph(page: Any, service: Any, run: Any) -> None:
    """The page of a run, wide enough for its run graph."""
    page.set_viewport_size({"width": 1700, "height": 1000})
    page.goto(f"{service.url}/runs/flow-run/{run['id']}")
    page.get_by_text("Completed", exact=True).first.wait_for()
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(3000)  # it is drawn once its data has come


def test_the_run_graph_is_the_diagram(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    open_graph(page, service, finished(service, "precompute", 1))
    picture("run-graph")
    open_form(page, service)
    start(page, 6)
    run = finished(service, "precompute", 2)
    open_graph(page, service, run)
    picture("run-graph-cached")
    tasks = service.ask("POST", "/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    assert {task["state_name"] for task in tasks} == {"Cached"}


def test_a_value_that_the_form_refuses(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    before = service.ask("POST", "/flow_runs/count")
    open_form(page, service)
    field = page.get_by_label(BUDGET)
    field.fill("-1")
    page.get_by_role("button", name="Submit").click()
    field.evaluate("field => field.scrollIntoView({block: 'center'})")
    assert field.evaluate("field => field.validationMessage") == "Value must be greater than or equal to 1."
    picture("refused-by-the-form")
    page.wait_for_timeout(1000)
    assert "/run?" in page.url  # still the form
    assert service.ask("POST", "/flow_runs/count") == before
    field.fill("")
    field.press_sequentially("many")
    assert field.input_value() == ""  # letters do not enter the field


def test_a_value_that_the_run_refuses(service: Any, page: Any, picture: Callable[[str], None]) -> None:
    from playwright.sync_api import expect

    open_form(page, service)
    start(page, 1)
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible(timeout=PATIENCE)
    page.get_by_role("tab", name="Details").click()
    told = page.get_by_text(
        re.compile(r"sampling\.references_per_prompt = 1 is too few .*: set it to 2 or more")
    ).first
    expect(told).to_be_visible(timeout=PATIENCE)
    picture("refused-by-the-run")
