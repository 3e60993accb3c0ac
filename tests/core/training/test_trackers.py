"""`training.report_to`: what real trackers keep, what is checked first, and that none ends a training."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from qrpo_core.common import extras
from qrpo_core.common.errors import ConfigError
from qrpo_core.config import ObjectiveConfig, TrainingConfig, cache_key_fields
from qrpo_core.pipeline import tracker_checks
from qrpo_core.pipeline.tracker_checks import check_trackers
from qrpo_core.training import run
from qrpo_core.training.run import train_policy
from tests.core.training.test_run import EXAMPLES

#: TensorBoard stores float32.
FLOAT32 = 2.0**-23


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and variables of the trackers that end with the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TENSORBOARD_LOGGING_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "x")  # so that monkeypatch takes away what the code sets
        monkeypatch.delenv(name)


def train(model: Path, folder: Path, *trackers: str) -> list[dict[str, float]]:
    training = {"precision": "fp32", "batch_size": 4, "learning_rate": 1e-3, "report_to": trackers}
    return train_policy(
        EXAMPLES,
        model,
        folder / "policy",
        objective=ObjectiveConfig(beta=0.5),
        training=TrainingConfig.model_validate(training),
        work=folder / "work",
        run_name="demo-qrpo-1234",
    ).history


def test_tensorboards_event_files_hold_every_metric_of_every_step(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(tiny_model, tmp_path, "tensorboard")
    kept = EventAccumulator(str(tmp_path / "runs" / "demo-qrpo-1234"))
    kept.Reload()
    for name in history[0].keys() - {"step", "epoch"}:  # the closing summary has an epoch, too
        events = [(event.step, event.value) for event in kept.Scalars(f"train/{name}")]
        wanted = [(entry["step"], entry[name]) for entry in history if name in entry]
        assert [step for step, _ in events] == [step for step, _ in wanted], name
        np.testing.assert_allclose([v for _, v in events], [v for _, v in wanted], rtol=FLOAT32)


def test_mlflows_store_holds_every_metric_of_every_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    history = train(tiny_model, tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("qrpo")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("demo-qrpo-1234", "FINISHED")
    for name in ("loss", "learning_rate", "grad_norm"):
        found = {each.step: each.value for each in client.get_metric_history(kept.info.run_id, name)}
        assert found == {int(entry["step"]): entry[name] for entry in history}, name


def test_wandb_offline_keeps_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    check_trackers(TrainingConfig(report_to=("wandb",)))
    assert len(train(tiny_model, tmp_path, "wandb")) == 3
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_a_training_is_the_same_with_trackers_and_without(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    one, two = train(tiny_model, tmp_path / "a", "tensorboard"), train(tiny_model, tmp_path / "b")
    for name in ("loss", "grad_norm", "kl"):
        assert [entry[name] for entry in one] == [entry[name] for entry in two]
    both = (TrainingConfig(), TrainingConfig(report_to=("tensorboard", "mlflow")))
    assert cache_key_fields(both[0]) == cache_key_fields(both[1])


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_ends_no_training_and_is_one_warning(
    event: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from qrpo_core.training.trackers import LenientCallback

    class Broken(TrainerCallback):
        def __init__(self) -> None:
            self.calls = 0

    def fail(self: Broken, *given: Any, **named: Any) -> None:
        self.calls += 1
        raise ConnectionError("the server has gone")

    setattr(Broken, event, fail)
    broken = Broken()
    monkeypatch.setattr(run, "tracker", lambda name, run_name: LenientCallback(broken, name))
    with caplog.at_level(logging.WARNING, "qrpo.train"):
        assert len(train(tiny_model, tmp_path, "mlflow")) == 3
    assert broken.calls == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name == "qrpo.train"]
    assert line == "mlflow failed, and gets nothing more of this training: the server has gone"


def test_a_server_that_is_not_there_is_refused_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda package: True)
    monkeypatch.setattr(tracker_checks, "ANSWER_WITHIN", 0.3)
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for server, how in ((closed, "ConnectError"), (silent, "ReadTimeout")):
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            with pytest.raises(ConfigError, match=f"MLflow at {address}/health gives no answer.*{how}"):
                check_trackers(TrainingConfig(report_to=("mlflow",)))
            monkeypatch.setenv("WANDB_BASE_URL", address)
            monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
            with pytest.raises(ConfigError, match=r"Weights & Biases at .* WANDB_MODE=offline"):
                check_trackers(TrainingConfig(report_to=("wandb",)))


def test_accounts_and_packages_are_checked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "installed", lambda package: True)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="no key of Weights & Biases"):
        check_trackers(TrainingConfig(report_to=("wandb",)))
    (tmp_path / "netrc").write_text("machine other.example login me password x\n")
    with pytest.raises(ConfigError, match="no key of Weights & Biases"):
        check_trackers(TrainingConfig(report_to=("wandb",)))
    monkeypatch.setattr(extras, "installed", lambda package: False)
    for name in ("wandb", "tensorboard", "mlflow"):
        with pytest.raises(ConfigError, match=rf"needs the package {name}.*pip install 'qrpo\[{name}\]'"):
            check_trackers(TrainingConfig(report_to=(name,)))
    check_trackers(TrainingConfig())  # off by default: nothing is asked
    with pytest.raises(ValueError, match="twice"):
        TrainingConfig(report_to=("wandb", "wandb"))
