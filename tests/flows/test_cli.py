"""The command line on bad input: one clear line, exit status 2, nothing written. And what needs no server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main


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


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


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
        (["number.yaml"], ["no reference", "reference_field"]),
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
    for stage in ("prompts", "sample references", "reference log-probs", "train", "evaluate", "report"):
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


def test_usage_errors_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run") == 2
    assert call("fly", "good.yaml") == 2
    assert "usage" in capsys.readouterr().err
