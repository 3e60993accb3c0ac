"""Missing rows computed on a Ray cluster: two nodes of it, on this machine. Needs the extra `ray`."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.service.server import PrefectServer
from qrpo_core.common.errors import CapError, ConfigError, DataError
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.first_rows import ROWS
from qrpo_core.pipeline.workspace import Workspace
from tasks import ray_runner
from tests.flows.small import small

#: A module whose function notes each load and each call of it, with its process; it can be told to fail.
SCORER = """
import os
from pathlib import Path

NOTES = Path(__file__).with_name("notes")

def note(what):
    with NOTES.open("a") as file:
        file.write(f"{what} {os.getpid()}\\n")

note("load")

def score(rows):
    note("call")
    doing = Path(__file__).with_name("doing")
    if doing.exists():
        if doing.read_text() == "be silent":
            return []
        doing.unlink()
        os._exit(1)
    return [float(len(row.completion)) for row in rows]
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder from which every process here imports."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(server: PrefectServer, modules: Path) -> Iterator[None]:
    """A cluster of two nodes with a CPU each, which this process has joined."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'qrpo[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home directory
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "240")  # a busy machine takes longer than the default
        patch.setenv("PYTHONPATH", os.pathsep.join([str(modules), *sys.path]))
        nodes = Cluster()
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1, include_dashboard=False)
            ray.init(nodes.address, namespace="qrpo", log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path, modules: Path) -> dict[str, Any]:
    name = f"scorer_{tmp_path.name}"
    (modules / name).mkdir()
    (modules / name / "__init__.py").write_text(SCORER)
    scorer = {"kind": "python", "python": {"function": f"{name}:score", "batch_size": 5}}
    return {**small(tiny_model, tmp_path / "store"), "reward": scorer}


def folder(settings: dict[str, Any], modules: Path) -> Path:
    """Where the scorer of these settings notes what it does."""
    return modules / settings["reward"]["python"]["function"].partition(":")[0]


def notes(settings: dict[str, Any], modules: Path, what: str) -> Counter[int]:
    """How often each other process has done something with the scorer."""
    lines = [line.split() for line in (folder(settings, modules) / "notes").read_text().splitlines()]
    return Counter(int(pid) for did, pid in lines if did == what and int(pid) != os.getpid())


def precompute(settings: dict[str, Any], pool: str = "ray") -> dict[str, int]:
    """Rows that each block stage computed."""
    from flows.precompute import precompute as flow

    stages = {stage.stage: stage.computed for stage in flow(parse_experiment(settings), pool)}
    return {
        name: stages[name]
        for name in ("sample references", "annotate references", "score reference log-probs")
    }


def stored(settings: dict[str, Any]) -> list[int]:
    """Rows in the store of the steps sample and score; each row counts as often as it was committed."""
    workspace = Workspace(parse_experiment(settings))
    return [
        sum(
            row_range.count for block in workspace.blocks.committed(step.recipe) for row_range in block.ranges
        )
        for step in reference_steps(workspace)
    ]


def task_runs() -> dict[str, str]:
    """Every task run that computes a shard, with its state."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs()
    return {str(run.id): run.state_name or "" for run in runs if run.name.startswith("shard of ")}


@pytest.mark.slow
def test_every_row_once_and_an_engine_a_process(
    cluster: None, settings: dict[str, Any], modules: Path
) -> None:
    made = precompute(settings)
    assert made["sample references"] == made["score reference log-probs"] == 60
    # The reward is tried on a shard's first rows while none is scored: by one shard, or by both at once.
    assert made["annotate references"] in (60 - ROWS, 60 - 2 * ROWS)
    assert stored(settings) == [60, 60]
    calls, loads = notes(settings, modules, "call"), notes(settings, modules, "load")
    assert len(calls) == 2  # a process a node, and this one has scored nothing
    assert min(calls.values()) > 1
    assert loads == dict.fromkeys(
        calls, 1
    )  # every process loads it at its start: the same two for all stages
    assert set(precompute(settings).values()) == {0}
    assert notes(settings, modules, "load") == loads  # nothing was missing, and no process was started
    settings["sampling"]["references_per_prompt"] = 6
    assert set(precompute(settings).values()) == {30}
    assert stored(settings) == [90, 90]
    deadline = time.monotonic() + 180  # the server's record lags behind
    while Counter(task_runs().values()) != {"Completed": 2 * 2 * 3} and time.monotonic() < deadline:
        time.sleep(1)
    assert Counter(task_runs().values()) == {"Completed": 2 * 2 * 3}  # shards of three stages, twice


@pytest.mark.slow
def test_what_a_lost_process_left_is_computed_by_others(
    cluster: None, settings: dict[str, Any], modules: Path
) -> None:
    (folder(settings, modules) / "doing").write_text("die")
    made = precompute(settings)
    assert made["sample references"] == made["score reference log-probs"] == 60
    assert made["annotate references"] == 60 - ROWS  # the first call ended its process; the other shard tried
    assert stored(settings) == [60, 60]
    assert not (folder(settings, modules) / "doing").exists()


@pytest.mark.slow
def test_an_error_of_a_shard_ends_the_run_with_its_message(
    cluster: None, settings: dict[str, Any], modules: Path
) -> None:
    (folder(settings, modules) / "doing").write_text("be silent")
    with pytest.raises(DataError, match=r"returned 0 scores for \d rows"):
        precompute(settings)


@pytest.mark.slow
def test_a_cap_of_gpu_hours_stops_the_stage_that_runs(cluster: None, settings: dict[str, Any]) -> None:
    """The first stage here that takes a GPU's time is the last: the fake engine and the reward take none."""
    with pytest.raises(CapError, match=r"stopped at the cap .*\[score reference log-probs\]"):
        precompute({**settings, "service": {"max_gpu_hours": 1e-9}})


def test_without_the_package_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray \[pool\]: pip install 'qrpo\[ray\]'"):
        ray_runner._ray()


@pytest.mark.parametrize("address", ["ray://", "ray://head", "ray://head:port"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f"'{address}' is not the address"):
        ray_runner.OnRay(address)


def test_a_cluster_is_asked_for_nothing_before_a_row_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with ray_runner.OnRay():
        pass


@pytest.mark.parametrize(
    ("nodes", "vllm", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, (2, {"num_cpus": 4, "scheduling_strategy": "SPREAD"})),
        ([{"memory": 1.0}, {"CPU": 0.5}, {"CPU": 2.0}], None, (1, {"num_cpus": 2})),  # the head takes no work
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}, {"GPU": 1.0}], None, (5, {"num_gpus": 1})),
        ([{"GPU": 4.0}, {"GPU": 3.0}], {"tensor_parallel_size": 2}, (3, {"num_gpus": 2})),
        ([{"GPU": 8.0}], {"tensor_parallel_size": 2, "engines": 2}, (2, {"num_gpus": 4})),
    ],
)
def test_how_many_processes_a_cluster_has_room_for(
    tmp_path: Path, nodes: list[dict[str, float]], vllm: Any, expected: tuple[int, dict[str, Any]]
) -> None:
    count, options = ray_runner.process_layout(nodes, experiment(tmp_path, vllm))
    assert count == expected[0]
    assert expected[1].items() <= options.items()


@pytest.mark.parametrize(
    ("nodes", "vllm", "message"),
    [
        ([{"memory": 1.0}], None, "no node of the Ray cluster has a CPU or a GPU"),
        ([{"GPU": 1.0}, {"GPU": 1.0}], {"tensor_parallel_size": 2}, "the engines need 2 GPUs on one node"),
    ],
)
def test_a_cluster_without_room_is_refused(
    tmp_path: Path, nodes: list[dict[str, float]], vllm: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_runner.process_layout(nodes, experiment(tmp_path, vllm))


def experiment(tmp_path: Path, vllm: Any) -> Any:
    """An experiment that draws with vLLM, or, for None, with the fake engine."""
    settings = small(tmp_path, tmp_path)
    if vllm:
        settings["sampling"]["engine"] = "vllm"
        settings["vllm"] = vllm
    return parse_experiment(settings)
