"""Who computes missing rows: the workers of a pool, or the run itself. A server, and no worker's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Running, Scheduled

from flows.deploy import create_pools
from flows.server import PrefectServer
from qrpo_core.errors import ConfigError, QRPOError
from qrpo_core.experiments import parse_experiment
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.workspace import Workspace
from tasks import pool
from tests.flows.small import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pools(server: PrefectServer) -> None:
    create_pools(server.url)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was said of problems that are being mended."""
    said: list[str] = []
    monkeypatch.setattr(pool, "announce_problem", said.append)
    return said


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    return small(tiny_model, tmp_path / "store")


def precompute(settings: dict[str, Any], pool: str | None) -> dict[str, int]:
    """Rows that each block stage computed."""
    from flows.precompute import precompute as flow

    stages = {stage.stage: stage.computed for stage in flow(parse_experiment(settings), pool)}
    return {name: stages[name] for name in ("sample references", "score references", "reference log-probs")}


@pytest.fixture
def online(server: PrefectServer, pools: None) -> Iterator[None]:
    """A worker of the pool gpu that is online, as far as the server knows."""
    with get_client(sync_client=True) as client:
        client.send_worker_heartbeat("gpu", "a worker")
        yield
        client._client.delete("/work_pools/gpu/workers/a%20worker").raise_for_status()


def test_no_worker_is_online_and_the_run_computes_the_rows(
    server: PrefectServer, pools: None, settings: dict[str, Any], problems: list[str]
) -> None:
    assert set(precompute(settings, "gpu").values()) == {60}
    assert [line.partition(":")[0] for line in problems] == ["no worker of the work pool gpu is online"] * 3
    assert set(precompute(settings, "gpu").values()) == {0}  # nothing is missing: nobody is asked
    assert len(problems) == 3


def test_a_pool_that_is_not_there_is_refused(server: PrefectServer, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no work pool 'ghost' \[pool\]: run make deploy"):
        precompute(settings, "ghost")


def test_without_the_deployments_the_remedy_is_told(
    server: PrefectServer, online: None, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"no deployment sample-share/sample-share: run make deploy"):
        precompute(settings, "gpu")


def test_a_run_of_the_pool_itself_computes_the_rows(
    server: PrefectServer, online: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(pool, "_own_pool", lambda: "gpu")
    assert set(precompute(settings, "gpu").values()) == {60}
    assert all("this run is itself on the work pool gpu" in line for line in problems)


@flow
def sample_share() -> None:
    """Stands for the flow of that name: tests put its runs where they want them."""


def raised(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> SampleStep:
    """References computed and then asked for half as many more; the step to which they are missing."""
    monkeypatch.setattr(pool, "_LOOK", 0.1)
    precompute(settings, None)
    settings["sampling"]["references_per_prompt"] = 6
    return reference_steps(Workspace(parse_experiment(settings)))[0]


def test_shares_of_a_run_that_was_killed_are_waited_for(
    server: PrefectServer, pools: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    """A share that nobody waits for any longer computes the rows: they are not bought again."""
    step = raised(settings, monkeypatch)
    workspace = step.workspace
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(sample_share, state=Running(), tags=[f"share:{step.recipe.key}"]).id

        def compute() -> None:
            deadline = time.monotonic() + 60
            while not problems and time.monotonic() < deadline:  # until it is waited for
                time.sleep(0.05)
            for plan in workspace.blocks.plan(step.recipe, step.wanted, 16):
                workspace.blocks.commit(plan, step.compute(plan, lambda rows: None)[0], step.schema, 0.1)
            client.set_flow_run_state(run, Completed())

        elsewhere = threading.Thread(target=compute)
        elsewhere.start()
        assert precompute(settings, "gpu")["sample references"] == 30
        elsewhere.join()
    assert "sample references: waiting for 1 shares that were started before" in problems
    blocks = workspace.blocks.committed(step.recipe)
    assert sum(run.count for block in blocks for run in block.runs) == 90


def ended(state: State[Any], name: str = "share 1") -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name=name, state=state)


@pytest.mark.parametrize(
    ("state", "fruitless", "told"),
    [
        (Completed(), 0, None),
        (Completed(), 2, None),
        (Completed(), 3, "same store"),
        (Crashed(message="gone"), 0, None),
        (Crashed(message="gone"), 2, None),
        (Crashed(message="gone"), 3, "gone"),
        (Failed(message="ConfigError: no"), 0, None),
        (Failed(message="ConfigError: no"), 1, "ConfigError: no"),
        (Cancelled(), 0, "Cancelled"),
        (Cancelling(), 0, "Cancelling"),  # and its worker is gone: it would be that for ever
    ],
)
def test_when_shares_are_started_again(
    state: State[Any], fruitless: int, told: str | None, problems: list[str]
) -> None:
    if told is None:
        pool._judge([ended(state)], fruitless)
        assert len(problems) == (state.type != StateType.COMPLETED)
    else:
        with pytest.raises(QRPOError, match=told):
            pool._judge([ended(Completed()), ended(state)], fruitless)


def test_shares_that_nobody_takes_are_computed_here(
    server: PrefectServer, pools: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    """The last worker went away before it took them."""
    step = raised(settings, monkeypatch)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(sample_share, state=Scheduled(), tags=[f"share:{step.recipe.key}"]).id
        assert set(precompute(settings, "gpu").values()) == {30}
        state = client.read_flow_run(run).state
        assert state is not None
        assert state.is_cancelled()
