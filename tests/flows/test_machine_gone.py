"""`qrpo run` is killed in its training, and its machine is gone: another one with the same store goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.service.server import PrefectServer
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.training import checkpoint_recipe
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.checkpoint_store import CheckpointStore
from tests.flows.small import small

ROOT = Path(__file__).parents[2]
TIMED = {"tokens_per_second", "peak_memory_gb"}


def begin(experiment: Experiment, machine: Path) -> subprocess.Popen[bytes]:
    """The command on a machine whose caches are its own."""
    machine.mkdir()
    file = machine / "experiment.json"
    file.write_text(experiment.model_dump_json())
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from flows.cli.main import main; main(sys.argv[1:])",
            "run",
            str(file),
        ],
        cwd=ROOT,
        env={**os.environ, "QRPO_CACHE": str(machine / "cache")},
        stdout=(machine / "printed").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def printed(machine: Path) -> str:
    return (machine / "printed").read_text()


def history(experiment: Experiment) -> list[dict[str, Any]]:
    """What the training of the stored policy logged, without what the clock decides."""
    workspace = Workspace(experiment)
    made = workspace.artifacts.get(stored_steps(workspace).first.train_recipe)
    entries = json.loads(workspace.artifacts.read(made, "history.json"))
    return [{name: value for name, value in entry.items() if name not in TIMED} for entry in entries]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_another_machine_goes_on(
    server: PrefectServer, tiny_model: Path, s3_store: StoreConfig, tmp_path: Path
) -> None:
    training = {"precision": "fp32", "batch_size": 2, "learning_rate": 1e-3, "checkpoint_minutes": 0}
    alone = parse_experiment(small(tiny_model, tmp_path / "alone") | {"name": "alone", "training": training})
    assert begin(alone, tmp_path / "third").wait() == 0, printed(tmp_path / "third")
    asked = parse_experiment(alone.model_dump() | {"name": "gone", "store": s3_store.model_dump()})

    first = begin(asked, tmp_path / "first")
    recipe = checkpoint_recipe(stored_steps(Workspace(alone)).first.train_recipe)
    stored = CheckpointStore(s3_store, recipe)
    while not any(each.step >= 4 for each in stored.complete()):
        assert first.poll() is None, printed(tmp_path / "first")
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    assert begin(asked, tmp_path / "second").wait() == 0, printed(tmp_path / "second")
    with get_client(sync_client=True) as client:
        logged = client.request("POST", "/logs/filter", json={"sort": "TIMESTAMP_DESC", "limit": 200}).json()
    assert any("fetching the checkpoint of step" in each["message"] for each in logged)
    assert history(asked) == history(alone)
    assert stored.complete() == []
