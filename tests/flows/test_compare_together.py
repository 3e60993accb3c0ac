"""Two comparisons at once on one machine: what another run trains is waited for."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.errors import BusyError
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.pipeline.comparison import result_of
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.training import is_trained_now, work_directory
from qrpo_core.pipeline.variants import expand
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.training.launch import exclusive_lock
from tests.flows.test_compare import experiment, run

pytestmark = pytest.mark.slow


class Waited(logging.Handler):
    """Sets `seen` once the comparison says that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for another run" in record.getMessage():
            self.seen.set()


def test_a_training_of_another_run_is_waited_for_and_the_others_come_first(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = experiment(tiny_model, tmp_path / "store")
    run(wanted, vary=("training.learning_rate=1e-3",), seeds=1)
    two = {"vary": ("training.learning_rate=2e-3,3e-3",), "seeds": 1}
    first, _ = expand(wanted, ComparisonConfig(**two))
    workspace = Workspace(first.with_seed(0))
    recipe = stored_steps(workspace).first.train_recipe
    handler, held = Waited(), threading.Event()

    def other_run() -> None:
        with exclusive_lock(work_directory(recipe) / "lock"):
            held.set()
            handler.seen.wait()

    other = threading.Thread(target=other_run)
    logging.getLogger("prefect.flow_runs").addHandler(handler)
    other.start()
    try:
        held.wait()
        assert is_trained_now(recipe)
        with (
            pytest.raises(BusyError, match="another run is training"),
            exclusive_lock(work_directory(recipe) / "lock", patience=0),
        ):
            pass
        compared, computed = run(wanted, **two)
    finally:
        handler.seen.set()
        other.join()
        logging.getLogger("prefect.flow_runs").removeHandler(handler)
    # A process that another thread starts has the lock's file until its program begins.
    deadline = time.monotonic() + 30
    while is_trained_now(recipe) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_trained_now(recipe)
    assert compared.failed == 0
    assert computed["train policy"] == computed["evaluate policy"] == 2
    variants = [each.variant for each in result_of(compared.manifest).variants]
    assert variants == ["learning_rate 2e-3", "learning_rate 3e-3"]  # in the order of the command line
