"""`qrpo run` itself, Prefect and its server included: Ctrl-C, then SIGKILL, then to the end."""

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
from qrpo_core.store.objects import open_objects
from tests.faults.accounts import Row, contents, same
from tests.faults.driver import DONE, INTERRUPTED
from tests.faults.scene import PATIENCE, Scene, Truth, settings

pytestmark = pytest.mark.slow


@pytest.fixture
def slow_experiment(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """With the transformers engine on a tiny model a block takes a moment, and nothing has to pretend."""
    found = settings(tmp_path, tiny_model, prompts=24)
    found["sampling"] |= {"engine": "transformers", "batch_size": 1, "max_new_tokens": 32}
    return found


class CommandLine:
    """`qrpo run --flow precompute` as a process, as if from a terminal."""

    def __init__(self, folder: Path, experiment: dict[str, Any]) -> None:
        file = folder / "experiment.yaml"
        file.write_text(yaml.safe_dump(experiment))
        self.error = (folder / "error.txt").open("w+")
        command = [sys.executable, "-m", "flows.cli", "run", str(file), "--flow", "precompute"]
        environment = {**os.environ, "PREFECT_HOME": str(folder / "prefect")}
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


def test_qrpo_run_goes_on_after_ctrl_c_and_after_sigkill(
    tmp_path: Path, slow_experiment: dict[str, Any], running: list[CommandLine]
) -> None:
    store = StoreConfig(path=str(tmp_path / "store"), rows_per_block=4)
    experiment = {**slow_experiment, "store": store.model_dump(mode="json")}

    def start() -> CommandLine:
        running.append(CommandLine(tmp_path, experiment))
        return running[-1]

    first = start()
    _wait_for_blocks(store, "sample", 2, first)
    first.send(signal.SIGINT)
    assert first.wait() == INTERRUPTED, first.printed
    assert first.printed.splitlines()[-1].startswith("qrpo: interrupted; what was committed stays")
    assert "Traceback" not in first.printed
    kept = _rows(store)
    assert len(kept) >= 8

    second = start()
    _wait_for_blocks(store, "logprob", 2, second)
    second.send(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    later = _rows(store)
    samples = {row for row in later if row[0] == "sample"}
    bought = len(samples) - len(kept)
    assert f"{bought} rows computed, {len(kept)} reused" in second.printed, second.printed
    assert all(later[row] == value for row, value in kept.items())

    third = start()
    assert third.wait() == DONE, third.printed
    for stage in ("sample references", "score references"):
        assert f"{stage}            cached, {len(samples)} rows reused" in third.printed, third.printed
    scored = sum(row[0] == "logprob" for row in later)
    assert f"{len(samples) - scored} rows computed, {scored} reused" in third.printed, third.printed

    truth = Truth(tmp_path / "truth", slow_experiment)
    expected = truth.rows(4)
    final = _rows(store)
    assert final.keys() == expected.keys()
    assert all(same(row[0], value, expected[row]) for row, value in final.items())
    scene = Scene(tmp_path / "scene", slow_experiment, store, truth)
    assert scene.outcome("Ctrl-C and SIGKILL of qrpo run", 2, 4).wrong == 0


def _wait_for_blocks(store: StoreConfig, step: str, count: int, run: CommandLine) -> None:
    index = Path(store.path) / "blocks" / step
    deadline = time.monotonic() + PATIENCE
    while len(list(index.glob("*/index/*.json"))) < count:
        assert run.process.poll() is None, run.printed
        assert time.monotonic() < deadline, run.printed
        time.sleep(0.005)


def _rows(store: StoreConfig) -> dict[Row, dict[str, Any]]:
    return dict(contents(open_objects(store)))
