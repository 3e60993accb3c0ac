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

from flows.service.deploy import create_pools
from flows.service.server import PrefectServer
from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.workspace import Workspace
from tasks import work_pool
from tests.flows.small import small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pools(server: PrefectServer) -> None:
    create_pools(server.url)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of the run."""
    said: list[str] = []
    monkeypatch.setattr(work_pool, "announce_problem", said.append)
    return said


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    return small(tiny_model, tmp_path / "store")


def precompute(settings: dict[str, Any], pool: str | None) -> dict[str, int]:
    """Rows that each block stage computed."""
    from flows.precompute import precompute as flow

    stages = {stage.stage: stage.computed for stage in flow(parse_experiment(settings), pool)}
    return {
        name: stages[name]
        for name in ("sample references", "annotate references", "score reference log-probs")
    }


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
    with pytest.raises(ConfigError, match=r"no work pool 'ghost' \[pool\]: .* run make deploy"):
        precompute(settings, "ghost")


def test_without_the_deployments_the_remedy_is_told(
    server: PrefectServer, online: None, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"no deployment sample-shard/sample-shard: run make deploy"):
        precompute(settings, "gpu")


def test_a_run_of_the_pool_itself_computes_the_rows(
    server: PrefectServer, online: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(work_pool, "_own_pool", lambda: "gpu")
    assert set(precompute(settings, "gpu").values()) == {60}
    assert all("this run is itself on the work pool gpu" in line for line in problems)


@flow
def sample_shard() -> None:
    """Stands for the flow of that name: tests put its runs where they want them."""


def add_references(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> SampleStep:
    """Compute references, raise the budget by half, and return the sampling step, which lacks those rows."""
    monkeypatch.setattr(work_pool, "POLL_SECONDS", 0.1)
    precompute(settings, None)
    settings["sampling"]["references_per_prompt"] = 6
    return reference_steps(Workspace(parse_experiment(settings)))[0]


def test_shards_of_a_run_that_was_killed_are_waited_for(
    server: PrefectServer, pools: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    """A shard whose run is gone still computes its rows, and they are computed once."""
    step = add_references(settings, monkeypatch)
    workspace = step.workspace
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(sample_shard, state=Running(), tags=[f"shard:{step.recipe.key}"]).id

        def compute() -> None:
            deadline = time.monotonic() + 300
            while not problems and time.monotonic() < deadline:  # until it is waited for
                time.sleep(0.05)
            for plan in workspace.blocks.plan(step.recipe, step.wanted, 16):
                workspace.blocks.commit(plan, step.compute(plan, lambda rows: None)[0], step.schema, 0.1)
            client.set_flow_run_state(run, Completed())

        elsewhere = threading.Thread(target=compute)
        elsewhere.start()
        assert precompute(settings, "gpu")["sample references"] == 30
        elsewhere.join()
    assert "sample references: waiting for 1 shards that were started before" in problems
    blocks = workspace.blocks.committed(step.recipe)
    assert sum(row_range.count for block in blocks for row_range in block.ranges) == 90


def ended(state: State[Any], name: str = "shard 1") -> FlowRun:
    return FlowRun(id=uuid4(), flow_id=uuid4(), name=name, state=state)


@pytest.mark.parametrize(
    ("state", "fruitless", "message"),
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
def test_when_shards_are_started_again(
    state: State[Any], fruitless: int, message: str | None, problems: list[str]
) -> None:
    if message is None:
        work_pool._check([ended(state)], fruitless)
        assert len(problems) == (state.type != StateType.COMPLETED)
    else:
        with pytest.raises(QRPOError, match=message):
            work_pool._check([ended(Completed()), ended(state)], fruitless)


def test_shards_that_nobody_takes_are_computed_here(
    server: PrefectServer, pools: None, settings: dict[str, Any], problems: list[str], monkeypatch: Any
) -> None:
    """The last worker went away before it took them."""
    step = add_references(settings, monkeypatch)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(sample_shard, state=Scheduled(), tags=[f"shard:{step.recipe.key}"]).id
        assert set(precompute(settings, "gpu").values()) == {30}
        state = client.read_flow_run(run).state
        assert state is not None
        assert state.is_cancelled()
