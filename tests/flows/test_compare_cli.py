"""`qrpo compare` and `qrpo runs` without a server: bad input, the plan, an empty store."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.flows.small import call, small


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    return path


def test_variants_that_cannot_be_trained_are_refused_together(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", str(file), "--vary", "objective.kind=qrpo,dpo,sft") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qrpo: 2 of 3 variants cannot be compared: dpo: ")
    assert "sft: " in line
    assert call("compare", str(file)) == 2
    assert "nothing varies" in capsys.readouterr().err
    assert not (file.parent / "store" / "artifacts").exists()


def test_the_plan_counts_trainings_and_writes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ("--set", "training_data.mode=pairs")
    varied = ("--vary", "objective.kind=qrpo,dpo", "--seeds", "2")
    assert call("compare", str(file), *pairs, *varied, "--plan") == 0
    said = capsys.readouterr().out
    assert "To compute: 4 trainings and 4 evaluations; 0 are cached." in said
    assert call("compare", str(file), *pairs, *varied, "--plan", "--choose-on", "validation") == 0
    assert "2 further trainings and evaluations of each chosen one follow" in capsys.readouterr().out
    assert not (file.parent / "store" / "artifacts").exists()
    assert call("runs", str(file)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "No run. --store PATH names another store."
    assert call("pool", str(file)) == 2
    assert "qrpo run EXPERIMENT --flow precompute draws" in capsys.readouterr().err


def test_a_variant_that_cannot_fit_is_named_before_anything_is_computed(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first variant fits on the GPU, and the last does not; both orders are refused alike."""
    monkeypatch.setattr("qrpo_core.inspection.memory.visible_gpu_memory", lambda: 4_000_000)
    for sizes in ("1,64", "64,1"):
        varied = ("--vary", f"training.batch_size={sizes}")
        for more in ((), ("--plan",), ("--seeds", "2", "--choose-on", "validation")):
            assert call("compare", str(file), *varied, *more) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("qrpo: batch_size 64: train policy needs ")
    assert not (file.parent / "store" / "artifacts").exists()
    assert call("compare", str(file), "--vary", "training.batch_size=1,2", "--plan") == 0
