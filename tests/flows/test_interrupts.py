"""Ctrl-C while Prefect itself is at work: an interrupt all the same."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from flows.cli import commands
from flows.cli.main import main
from flows.service.server import PrefectServer
from qrpo_core.config.reading import parse_experiment
from tasks.interrupts import is_interrupt, reraise_interrupts
from tests.flows.small import small


def made_of(error: BaseException, *, named: bool) -> ValueError:
    """What comes of an error whose handling fails: a ValueError, raised from it or while it was handled."""
    try:
        try:
            raise error
        except BaseException as first:
            if named:
                raise ValueError("Task run is not set") from first
            raise ValueError("Task run is not set")  # noqa: B904
    except ValueError as found:
        return found


@pytest.mark.parametrize("named", [True, False])
def test_an_interrupt_is_raised_as_one(named: bool) -> None:
    lost = made_of(made_of(KeyboardInterrupt(), named=named), named=not named)
    assert is_interrupt(lost)
    with pytest.raises(KeyboardInterrupt) as found, reraise_interrupts():
        raise lost
    assert found.value.__cause__ is lost


def test_another_error_stays_as_it_is() -> None:
    other = made_of(OSError("no space"), named=False)
    assert not is_interrupt(other)
    with pytest.raises(ValueError, match="not set"), reraise_interrupts():
        raise other


def test_the_command_line_says_what_it_says_of_any_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Any) -> int:
        raise made_of(error, named=False)

    monkeypatch.setattr(commands, "run", run)
    error: BaseException = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stopped:
        main(["run", "experiment.yaml"])
    assert stopped.value.code == 130
    printed = capsys.readouterr().err
    assert printed == "qrpo: interrupted; committed results stay, run again to continue\n"
    error = OSError("no space")
    with pytest.raises(ValueError, match="not set"):
        main(["run", "experiment.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compute quantiles", "block"])
def test_while_prefect_creates_a_task_run(
    server: PrefectServer,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Of an artifact, and of the first block: nothing is lost, and the next run computes what is missing."""
    from prefect import task_engine
    from prefect.client.orchestration import get_client

    from flows.precompute import precompute

    create = task_engine._create_task_run_locally
    left = [name]

    def create_interrupted(*arguments: Any, task: Any, **named: Any) -> Any:
        if task.name in left:
            left.remove(task.name)
            signal.raise_signal(signal.SIGINT)
        return create(*arguments, task=task, **named)

    monkeypatch.setattr(task_engine, "_create_task_run_locally", create_interrupted)
    asked = parse_experiment(
        {"name": f"interrupted-{name.replace(' ', '-')}"} | small(tiny_model, tmp_path / "store")
    )
    with pytest.raises(KeyboardInterrupt):
        precompute(asked)
    assert not [record for record in caplog.records if record.exc_info and record.levelno >= logging.INFO]
    named = {"flow_runs": {"name": {"like_": asked.name}}}
    with get_client(sync_client=True) as client:
        (run,) = client.request("POST", "/flow_runs/filter", json=named).json()
    assert run["state_name"] == "Crashed"
    (drawn,) = [stage for stage in precompute(asked) if stage.stage == "sample references"]
    assert (drawn.reused, drawn.computed) == ((0, 60) if name == "block" else (60, 0))
