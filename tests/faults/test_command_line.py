"""`qrpo run` itself, Prefect and its server included: SIGKILL, Ctrl-C, then to the end without Prefect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.opening import open_objects
from tests.faults.accounts import Row, contents
from tests.faults.driver import INTERRUPTED
from tests.faults.scene import Scene, Truth, settings
from tests.prefect_home import prefect_home

pytestmark = [pytest.mark.slow, pytest.mark.long]

#: The longest that a step of a run may take on a busy machine, seconds.
PATIENCE = 120.0


@pytest.fixture
def slow_experiment(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """With the transformers engine on a tiny model a block takes a moment, and nothing has to pretend."""
    found = settings(tmp_path, tiny_model, prompts=14)
    found["sampling"] |= {"engine": "transformers", "batch_size": 1, "max_new_tokens": 32}
    return found


class CommandLine:
    """`qrpo run --flow precompute` as a process, as if from a terminal."""

    def __init__(self, folder: Path, experiment: dict[str, Any], home: Path) -> None:
        file = folder / "experiment.yaml"
        file.write_text(yaml.safe_dump(experiment))
        self.error = (folder / "error.txt").open("w+")
        command = [sys.executable, "-m", "flows.cli", "run", str(file), "--flow", "precompute"]
        environment = {**os.environ, "PREFECT_HOME": str(home)}
        environment.pop("PREFECT_API_URL", None)
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.error, stderr=self.error, start_new_session=True
        )

    def send(self, number: int) -> None:
        """A signal to what a terminal calls its foreground group."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    @property
    def printed(self) -> str:
        self.error.seek(0)
        return self.error.read()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[CommandLine]]:
    """Runs that were started; none outlives the test."""
    started: list[CommandLine] = []
    yield started
    for each in started:
        each.process.kill()
        each.process.wait()
        each.error.close()


def test_qrpo_run_survives_sigkill_and_ctrl_c(
    tmp_path: Path, slow_experiment: dict[str, Any], running: list[CommandLine]
) -> None:
    store = StoreConfig(path=str(tmp_path / "store"), rows_per_block=4)
    experiment = {**slow_experiment, "store": store.model_dump(mode="json")}

    home = prefect_home(tmp_path / "prefect")

    def start() -> CommandLine:
        running.append(CommandLine(tmp_path, experiment, home))
        return running[-1]

    first = start()
    _wait_for_blocks(store, "sample", 2, first)
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    kept = _rows(store)
    drawn = sum(row[0] == "sample" for row in kept)  # beside them, rewards of the first few
    assert drawn >= 8

    second = start()
    _wait_for_blocks(store, "logprob", 2, second)
    second.send(signal.SIGINT)
    assert second.wait() == INTERRUPTED, second.printed
    assert second.printed.splitlines()[-1].startswith("qrpo: interrupted; committed results stay")
    assert "Traceback" not in second.printed
    later = _rows(store)
    samples = sum(row[0] == "sample" for row in later)
    assert f"{samples - drawn} rows computed, {drawn} reused" in second.printed, second.printed
    assert all(later[row] == value for row, value in kept.items())

    scene = Scene(tmp_path / "scene", slow_experiment, store, Truth(tmp_path / "truth", slow_experiment))
    scene.look()
    outcome = scene.close("SIGKILL and Ctrl-C of qrpo run", 2).check()
    assert outcome.twice == 0
    assert outcome.bought == 3 * samples - len(later)


def _wait_for_blocks(store: StoreConfig, step: str, count: int, run: CommandLine) -> None:
    index = Path(store.path) / "blocks" / step
    deadline = time.monotonic() + PATIENCE
    while len(list(index.glob("*/index/*.json"))) < count:
        assert run.process.poll() is None, run.printed
        assert time.monotonic() < deadline, run.printed
        time.sleep(0.005)


def _rows(store: StoreConfig) -> dict[Row, dict[str, Any]]:
    return dict(contents(open_objects(store)))
