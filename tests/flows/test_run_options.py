"""Options of `qrpo run`: a work pool, a cap of GPU hours; and the receipt."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from flows.service.deploy import create_pools
from flows.service.server import PrefectServer
from tests.flows.small import call, small


@pytest.fixture
def experiment(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    return path


def test_a_flow_without_pooled_rows_refuses_a_pool(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", str(experiment), "--flow", "top_up", "--pool", "gpu") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the flow top_up computes no rows on a work pool [--pool gpu]" in said
    assert [path.name for path in experiment.parent.iterdir()] == ["small.yaml"]


@pytest.mark.slow
def test_run_takes_a_pool_and_names_one_that_the_server_lacks(
    server: PrefectServer, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", str(experiment), "--flow", "precompute", "--pool", "nowhere") == 2
    assert "no work pool 'nowhere'" in capsys.readouterr().err
    create_pools(server.url)
    assert call("run", str(experiment), "--flow", "precompute", "--pool", "gpu") == 0
    assert "no worker of the work pool gpu is online" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_stops_at_its_cap_and_the_next_goes_on_as_if_it_had_not(
    server: PrefectServer, experiment: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Log-probs stop between blocks, training after a checkpoint; losses are those of a run without cap."""
    settings = ("--set", "training.batch_size=8", "--set", "store.rows_per_block=16")
    whole = (*settings, "--set", f"store.path={tmp_path / 'whole'}")
    arguments = ("run", str(experiment), *settings)
    assert call(*arguments, "--flow", "precompute", "--max-gpu-hours", "1e-9") == 3
    said = capsys.readouterr().err
    assert "stopped at the cap of 1e-09 GPU hours" in said
    assert "[score reference log-probs]" in said
    scored = blocks(tmp_path / "store", "logprob")
    assert len(scored) == 1
    assert call(*arguments, "--flow", "precompute") == 0
    assert scored < blocks(tmp_path / "store", "logprob")
    assert call(*arguments, "--flow", "train", "--max-gpu-hours", "1e-9") == 3
    assert re.search(r"\[training, after step [23] of 8\]", " ".join(capsys.readouterr().err.split()))
    assert call(*arguments, "--flow", "train") == 0
    assert call("run", str(experiment), *whole, "--flow", "precompute") == 0
    assert call("run", str(experiment), *whole, "--flow", "train") == 0
    resumed, uninterrupted = (losses(tmp_path / name) for name in ("store", "whole"))
    assert len(resumed) == 8
    assert resumed == uninterrupted


@pytest.mark.slow
def test_every_run_ends_with_a_receipt_that_adds_up(
    server: PrefectServer, experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--set", "service.gpu_hour_price=2", "--set", "service.currency=EUR")
    found = []
    for _ in range(2):
        assert call("run", str(experiment), *settings, "--flow", "precompute") == 0
        found.append(receipt(capsys.readouterr().err))
    for lines in found:
        for paid, reused, anew in zip(lines["paid"], lines["reused"], lines["all anew"], strict=True):
            assert paid + reused == anew
    first, second = found
    assert first["reused"] == [0, 0, 0, 0]
    assert second["paid"][0] == 0
    assert second["paid"][2:] == [0, 0]
    assert second["reused"][0] == first["paid"][0]


def losses(store: Path) -> list[tuple[float, float]]:
    (history,) = store.glob("artifacts/train/*/*/history.json")
    return [(each["step"], each["loss"]) for each in json.loads(history.read_text())]


def blocks(store: Path, step: str) -> set[str]:
    return {path.name for path in store.glob(f"blocks/{step}/*/index/*.json")}


def receipt(text: str) -> dict[str, list[Decimal]]:
    """The lines of the receipt: rows and artifacts, seconds, GPU hours, cost."""
    lines = text.partition("receipt")[2].splitlines()[2:5]
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
    return {name: [Decimal(number.replace(",", "")) for number in numbers] for name, *numbers in cells}
