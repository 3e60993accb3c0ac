"""`qrpo compare` and `qrpo runs` without a server: bad input, the plan, an empty store."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qrpo_core.common.formatting import size
from qrpo_core.config.reading import load_experiment
from qrpo_core.inspection.memory import policy_shape
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.local import LocalObjects
from tests.flows.small import call, small


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small(tiny_model, tmp_path / "store")))
    return path


def small_policy_bytes(file: Path) -> int:
    """Bytes of a trained policy of the file's model, in float32."""
    shape = policy_shape(Workspace(load_experiment(file, [])))
    assert shape is not None
    return 4 * shape.parameters


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


@pytest.mark.parametrize(
    ("more", "policies"), [((), 4), (("--seeds", "3"), 6), (("--choose-on", "validation", "--seeds", "3"), 8)]
)
def test_the_plan_says_whether_the_disk_has_room_for_the_policies(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    policies: int,
) -> None:
    """With a choice: one training of each variant, and three of the chosen one of each objective."""
    varied = ("--set", "training_data.mode=pairs", "--vary", "objective.kind=qrpo,dpo", "--seeds", "2")
    one = small_policy_bytes(file)
    for free, said in ((policies * one, "; "), (policies * one - 1, ", but only ")):
        monkeypatch.setattr(LocalObjects, "free_bytes", lambda _, free=free: free)
        assert call("compare", str(file), *varied, *more, "--plan") == 0
        text = capsys.readouterr().out
        assert f"The store grows by about {size(policies * one)}{said}{size(free)} are free" in text


def test_the_plan_of_a_run_names_what_is_free(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda _: 10)
    assert call("plan", str(file)) == 0
    assert ", but only 10 B are free: the run would stop at a full disk" in capsys.readouterr().out


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
