"""The command line on bad input: one clear line, exit status 2, nothing written. And what needs no server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import progress_line
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.flows.small import call


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good experiment, `good.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(20))
    )
    experiment = {
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {"kind": "file", "path": "rows.jsonl", "held_out": 0.4},
        "sampling": {"engine": "fake"},
        "reward": {"kind": "length", "max_words": 3},
        "store": {"path": "store"},
    }
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(experiment))
    return tmp_path


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_bad_input_is_one_line_status_2_and_writes_nothing(
    folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": \n')
    (folder / "empty.jsonl").write_text("")
    shutil.copytree(tiny_model, folder / "untold", ignore=shutil.ignore_patterns("chat_template*"))
    told = folder / "untold" / "tokenizer_config.json"
    told.write_text(
        json.dumps({k: v for k, v in json.loads(told.read_text()).items() if k != "chat_template"})
    )
    gym = {
        "prompts": {"kind": "reasoning_gym", "task": "chain_some", "size": 4},
        "reward": {"kind": "reasoning_gym"},
    }
    experiment: dict[str, Any] = yaml.safe_load((folder / "good.yaml").read_text())
    (folder / "gym.yaml").write_text(yaml.safe_dump(experiment | gym))
    (folder / "number.yaml").write_text(yaml.safe_dump(experiment | {"reward": {"kind": "number"}}))
    cases = [
        (["good.yaml", "--set", "sampling.references=3"], ["sampling.references", "references_per_prompt"]),
        (["none.yaml"], ["none.yaml", "no experiment file"]),
        (["good.yaml", "--set", "prompts.path=gone.jsonl"], ["gone.jsonl"]),
        (["good.yaml", "--set", "prompts.path=broken.jsonl"], ["broken.jsonl", "3"]),
        (["good.yaml", "--set", "prompts.path=empty.jsonl"], ["empty.jsonl"]),
        (["gym.yaml"], ["chain_some", "chain_sum"]),
        (["good.yaml", "--set", "model.path=untold"], ["untold", "chat template"]),
        (["good.yaml", "--set", "model.path=nowhere/at/all"], ["nowhere/at/all"]),
        (["good.yaml", "--set", "objective.beta=-0.1"], ["objective.beta", "-0.1"]),
        (["good.yaml", "--set", "sampling.references_per_prompt=0"], ["references_per_prompt", "0"]),
        (["good.yaml", "--set", "sampling.references_per_prompt=1"], ["references_per_prompt", "2 or more"]),
        (["number.yaml"], ["no ground truth", "ground_truth_field"]),
        (["good.yaml", "--set", "store.path=gs://bucket"], ["gs", "s3://"]),
    ]
    before = listing(folder)
    for arguments, says in cases:
        for command in ("run", "plan"):
            assert call(command, *arguments) == 2, (command, arguments)
            out, err = capsys.readouterr()
            assert err.count("\n") == 1, err
            assert err.startswith("qrpo: ")
            assert out == ""
            for text in says:
                assert text in err, (text, err)
            assert listing(folder) == before, arguments


def test_plan_shows_every_stage_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(folder)
    assert call("plan", "good.yaml") == 0
    out = capsys.readouterr().out
    for stage in ("prepare prompts", "sample references", "train policy", "evaluate policy", "write report"):
        assert stage in out
    assert listing(folder) == before


def test_config_prints_what_can_be_read_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "good.yaml", "--set", "objective.beta=0.5") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["objective"]["beta"] == 0.5
    (folder / "again.yaml").write_text(printed)
    assert call("config", "again.yaml") == 0
    assert capsys.readouterr().out == printed
    assert call("config", "--schema") == 0
    assert "references_per_prompt" in capsys.readouterr().out


def test_show_before_a_run_says_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "good.yaml") == 2
    assert "no prompts artifact yet" in capsys.readouterr().err


def test_progress_counts_from_its_first_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What came before it, such as loading a tokenizer, showed as "checked 1 prompts" on a slow machine."""
    monkeypatch.setattr(progress_line, "_SECONDS", 0.0)
    progress = progress_line.progress_line("checked", "prompts")
    progress(1)
    assert capsys.readouterr().err == ""
    progress(2)
    assert capsys.readouterr().err == "qrpo: checked 3 prompts\n"


def test_usage_errors_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run") == 2
    assert call("fly", "good.yaml") == 2
    assert "usage" in capsys.readouterr().err


@pytest.fixture
def prepared(folder: Path) -> Workspace:
    """The good experiment with its training set in the store, in blocks of 4 rows."""
    workspace = Workspace(load_experiment("good.yaml"))
    prompts.build(workspace, prompts.recipe(workspace))
    first = stored_steps(workspace).first

    def fill(step: Any) -> None:
        for plan in workspace.blocks.plan(step.recipe, step.wanted, 4):
            table, facts = step.compute(plan, lambda count: None)
            workspace.blocks.commit(plan, table, step.schema, 1.0, **facts)

    for step in first.row_steps:
        fill(step)
    first.build_quantiles()
    fill(first.logprobs)
    first.build_training_set()
    return workspace


def test_explain_is_text_or_json(prepared: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = next(iter(stored_steps(prepared).first.rewards.completions.wanted))
    assert call("explain", "good.yaml", f"{prompt[:6]}:2") == 0
    text = capsys.readouterr().out
    assert call("explain", "good.yaml", f"{prompt}:2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (section,) = found["draws"]
    assert found["prompt"]["prompt_id"] == prompt
    assert section["completion"]["sample_index"] == 2
    for shown in (prompt, str(section["completion"]["seed"]), f"{section['targets']['target']:.6g}"):
        assert shown in text
    assert call("explain", "good.yaml", prompt) == 0
    assert "log-ratio target" in capsys.readouterr().out


def test_verify_says_damage_by_its_status_and_repairs_it(
    prepared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("verify", "good.yaml") == 0
    assert "Nothing is damaged." in capsys.readouterr().out
    block = prepared.blocks.committed(stored_steps(prepared).first.rewards.recipe)[0]
    Path("store", block.file).write_bytes(b"not Parquet")
    assert call("verify", "good.yaml") == 1
    out = capsys.readouterr().out
    assert block.manifest_key in out
    assert "--repair" in out
    assert call("verify", "good.yaml", "--repair") == 1
    assert "Quarantined: 1. The next run" in capsys.readouterr().out
    assert call("verify", "good.yaml", "--all") == 0
    assert call("ls", "good.yaml") == 0
    assert "Quarantined: 1" in capsys.readouterr().out


def test_gc_deletes_nothing_unasked(prepared: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(Path("store"))
    shutil.copy("good.yaml", "second.yaml")
    other = ("--set", "reward.max_words=5")
    assert call("gc", "good.yaml", "--older-than", "0") == 0
    assert "Nothing to delete that is older than 0 days." in capsys.readouterr().out
    assert call("gc", "second.yaml", *other) == 0
    assert "Nothing to delete that is older than 7 days." in capsys.readouterr().out
    assert call("gc", "second.yaml", "good.yaml", *other, "--older-than", "0") == 0
    out = capsys.readouterr().out
    assert "blocks reward/" in out
    assert "artifacts quantiles/" in out
    assert "blocks sample/" not in out
    assert "Nothing was deleted; add --apply to delete." in out
    assert listing(Path("store")) == before
    assert call("gc", "second.yaml", *other, "--older-than", "0", "--apply") == 0
    assert "Deleted: " in capsys.readouterr().out
    assert call("ls", "good.yaml") == 0
    out = capsys.readouterr().out
    assert "sample" in out
    assert "reward" not in out


def test_compact_says_before_and_after(prepared: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ls", "good.yaml") == 0
    capsys.readouterr()
    assert call("compact", "good.yaml") == 0
    assert "after." in capsys.readouterr().out
    assert call("verify", "good.yaml", "--all") == 0
    assert {len(prepared.blocks.committed(recipe)) for recipe in prepared.blocks.all_recipes()} == {1}


def test_what_cannot_be_meant_of_a_store_is_one_line_and_changes_nothing(
    prepared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = next(iter(stored_steps(prepared).first.rewards.completions.wanted))
    cases = [
        (["explain", "good.yaml", prompt[:5]], ["too short", "first 6 characters"]),
        (["explain", "good.yaml", "x" * 32], ["none of the 20 prompts", "the nearest are"]),
        (["explain", "good.yaml", f"{prompt}:99"], ["no completion 99", "references 0-7"]),
        (["explain", "good.yaml", f"{prompt}:first"], ["'first' is no sample_index"]),
        (["gc", "good.yaml", "--older-than", "-1"], ["--older-than -1", "0 or more"]),
        (["gc", "good.yaml", "--older-than", "nan"], ["--older-than nan"]),
        (["gc", "good.yaml", "none.yaml"], ["none.yaml", "no experiment file"]),
        (["ls", "good.yaml", "--set", "prompts.path=gone.jsonl"], ["gone.jsonl"]),
        (["verify", "good.yaml", "--set", "model.path=nowhere/at/all"], ["nowhere/at/all"]),
        (["compact", "good.yaml", "--set", "sampling.references=3"], ["did you mean"]),
    ]
    before = listing(Path())
    for arguments, says in cases:
        assert call(*arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), (arguments, err)
        for text in says:
            assert text in err, (text, err)
        assert listing(Path()) == before, arguments


def test_looking_after_a_store_loads_neither_torch_nor_prefect(prepared: Workspace) -> None:
    prompt = next(iter(stored_steps(prepared).first.rewards.completions.wanted))
    script = """
import sys
from flows.cli.main import main
prompt = sys.argv[1]
for arguments in (["explain", "good.yaml", prompt], ["explain", "good.yaml", prompt + ":0", "--json"],
        ["ls", "good.yaml", "--all"], ["verify", "good.yaml", "--all"], ["gc", "good.yaml", "--apply"],
        ["compact", "good.yaml"], ["browse", "good.yaml", "--json"],
        ["export", "good.yaml", "--out", "data"]):
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0, (arguments, done.code)
    heavy = [name for name in ("torch", "transformers", "prefect", "datasets", "scipy.stats", "matplotlib")
        if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{script}", prompt],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_doctor_says_what_is_missing_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qrpo_core.inspection import doctor

    monkeypatch.setattr(
        doctor, "CHECKS", (doctor.check_python, doctor.check_packages, doctor.check_bubblewrap)
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert call("doctor") == 0  # not every run needs a sandbox
    said = capsys.readouterr().out
    assert "bwrap is not on the path" in said
    assert "bubblewrap: apt install bubblewrap" in said
    broken = doctor.Check("python", False, "3.9", "install Python 3.11 or newer", needed=True)
    monkeypatch.setattr(doctor, "CHECKS", (lambda: broken,))
    assert call("doctor") == 1
    assert "install Python 3.11 or newer" in capsys.readouterr().out


def test_plan_shows_the_memory_of_stages_and_refuses_what_cannot_fit(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = "qrpo_core.inspection.memory.visible_gpu_memory"
    monkeypatch.setattr(seen, lambda: None)
    assert call("plan", "good.yaml") == 0
    assert "In host memory (no GPU):" in capsys.readouterr().out
    assert call("plan", "good.yaml", "--gpu-memory", "80") == 0
    assert "On each GPU (85.9 GB):" in capsys.readouterr().out
    before = listing(Path())
    for arguments, says in (
        (["plan", "good.yaml", "--gpu-memory", "0.001"], "and it has 1.07 MB"),
        (["plan", "good.yaml", "--gpu-memory", "-1"], "--gpu-memory -1 is not a GPU's memory"),
        (["plan", "good.yaml", "--price", "-1"], "--price -1 is not a price"),
        (["plan", "good.yaml", "--price", "nan"], "--price nan is not a price"),
        (["run", "good.yaml", "--max-gpu-hours", "0"], "max_gpu_hours"),
        (["run", "good.yaml"], "and it has 1 MB"),
        (["run", "good.yaml", "--flow", "train"], "train policy needs"),
    ):
        monkeypatch.setattr(seen, lambda: 10**6)  # what a run finds on its machine
        assert call(*arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), (arguments, err)
        assert says in err
        assert listing(Path()) == before


def test_browse_and_export_refuse_what_cannot_be_meant(
    prepared: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (["browse", "good.yaml", "--source", "round 7"], "'references'"),
        (["browse", "good.yaml", "--reward", "high"], "MIN:MAX"),
        (["browse", "good.yaml", "--limit", "0"], "1 or more"),
        (["export", "good.yaml", "--out", "store"], "exists already"),
    ]
    before = listing(Path())
    for arguments, says in cases:
        assert call(*arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert says in err
    assert listing(Path()) == before
    assert call("browse", "good.yaml", "--search", "Say", "--limit", "1") == 0
    assert "1 shown of " in capsys.readouterr().out
    assert call("export", "good.yaml", "--out", "data") == 0
    assert "training_set/train.parquet" in capsys.readouterr().out
