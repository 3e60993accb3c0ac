"""Presets, what a name of an experiment leads to, and what a filled-in form says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrpo_core.common.errors import ConfigError, MissingError, QRPOError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.form import ExperimentForm, whole
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.gc import delete, garbage
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.presets import experiment_of_form, named_experiment, presets, remove, save
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.opening import open_objects
from tests.core.small_experiment import settings
from tests.flows.small import call

__all__ = ["settings"]


@pytest.fixture
def folder(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, the working directory, with an experiment that has data and a reward of its own."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(12)))
    (folder / "mine.py").write_text("def score(batch):\n    return [len(r.completion) for r in batch]\n")
    own = {
        "prompts": {"kind": "file", "path": "rows.jsonl", "held_out": 0.3},
        "reward": {"kind": "python", "python": {"function": "mine:score"}},
        "store": {**settings.get("store", {}), "path": str(tmp_path / "store"), "tries": 7},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(settings | own | {"name": "own"}))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The store, with the preset `own`; the files that it was made of are gone."""
    assert call("preset", "own.yaml", "--save") == 0
    assert "Saved: preset own\n" in capsys.readouterr().out
    for file in folder.iterdir():
        file.unlink()
    return str(tmp_path / "store")


def test_a_preset_is_complete_without_the_files_of_its_author(store: str) -> None:
    found = named_experiment("own", ["objective.beta=0.5"], store)
    assert (found.name, found.objective.beta, found.store.path, found.store.tries) == ("own", 0.5, store, 7)
    workspace = Workspace(found)
    assert len(prompts.build(workspace, prompts.recipe(workspace)).files) > 0
    assert workspace.reward() is not None


def test_a_preset_is_listed_replaced_and_removed(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("preset", "--store", store) == 0
    assert "own" in (listed := capsys.readouterr().out)
    assert "rows.jsonl" in listed
    assert call("preset", "own", "--save", "--store", store, "--set", "objective.beta=0.7") == 0
    assert "Replaced: preset own\n" in capsys.readouterr().out
    assert named_experiment("own", (), store).objective.beta == 0.7
    assert call("config", "own", "--store", store) == 0
    assert "beta: 0.7" in capsys.readouterr().out
    assert call("preset", "own", "--remove", "--store", store) == 0
    assert presets(StoreConfig(path=store)) == []
    assert call("preset", "own", "--remove", "--store", store) == 2
    assert "no preset 'own'" in capsys.readouterr().err


def test_another_name_is_another_preset(store: str) -> None:
    assert call("preset", "own", "--save", "--store", store, "--set", "name=other") == 0
    assert [each.name for each in presets(StoreConfig(path=store))] == ["other", "own"]


def test_a_damaged_preset_hides_no_other(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    objects = open_objects(StoreConfig(path=store))
    objects.write("presets/cut.json", b"{")
    objects.write("presets/old.json", json.dumps({"store": {}, "gone": 1}).encode())
    assert call("preset", "--store", store) == 0
    listed = capsys.readouterr().out
    assert "cut cannot be read: it is damaged" in listed
    assert "old cannot be read" in listed
    assert "\nown " in listed


@pytest.mark.parametrize("name", ["12", "deadbeef", "a.yaml"])
def test_a_name_that_is_taken_for_a_file_or_a_run_is_refused(folder: Path, name: str) -> None:
    experiment = named_experiment("own.yaml", [f"name='{name}'"])
    with pytest.raises(ConfigError, match="cannot be called"):
        save(open_objects(experiment.store), experiment)
    with pytest.raises((MissingError, QRPOError)):
        remove(open_objects(experiment.store), "../own")


def test_a_file_comes_before_a_preset(store: str, folder: Path) -> None:
    (folder / "own").write_text(yaml.safe_dump(_minimal("from the file")))
    assert named_experiment("own", (), store).model.path == "from the file"


def _minimal(model: str) -> dict[str, Any]:
    return {
        "model": {"path": model},
        "prompts": {"kind": "file", "path": "rows.jsonl"},
        "reward": {"kind": "length", "max_words": 9},
    }


def test_a_name_that_leads_nowhere_says_where_it_looked(store: str) -> None:
    with pytest.raises(ConfigError, match=r"no experiment 'none': no file of that name, and no preset of"):
        named_experiment("none", (), store)
    with pytest.raises(ConfigError, match=r"no experiment file 'none\.yaml'"):
        named_experiment("none.yaml", (), store)


def test_gc_keeps_presets_and_their_files(store: str) -> None:
    found = named_experiment("own", (), store)
    other = found.model_copy(update={"reward": parse_experiment(_minimal("m")).reward})
    sweep = garbage([Workspace(other)], datetime.now(UTC) + timedelta(days=1), [])
    delete(Workspace(other).objects, sweep.garbage)
    assert Workspace(named_experiment("own", (), store)).reward() is not None


def test_the_form_is_a_command_line(store: str) -> None:
    def filled(**fields: Any) -> Experiment:
        return experiment_of_form({"based_on": "own", "store": store, **fields})

    assert filled() == named_experiment("own", (), store)
    found = filled(
        model="m", references=5, objective="dpo", beta=0.2, learning_rate=1e-5, reward="sentiment",
        overrides=["reward.python=null", "training_data.mode=pairs", "objective.beta=0.3"],
    )  # fmt: skip
    assert (found.model.path, found.sampling.references_per_prompt) == ("m", 5)
    assert (found.objective.kind, found.reward.kind) == ("dpo", "sentiment")
    assert found.training.learning_rate == 1e-5
    assert found.objective.beta == 0.3  # overrides come last
    given = filled(**whole(found), based_on="none", beta=0.4, store="elsewhere")
    assert given.model_dump() == found.model_dump() | {
        "objective": found.objective.model_dump() | {"beta": 0.4},
        "store": found.store.model_dump() | {"path": "elsewhere"},
    }


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "names no experiment: fill in based_on"),
        ({"based_on": "own", "gamma": 1}, "unknown key 'gamma'.*known here: based_on"),
        ({"based_on": "own", "reward": "length"}, "does not belong to kind 'length'"),
        ({"based_on": "own", "beta": -1}, "beta = -1 is refused"),
        ({"based_on": "own", "overrides": ["beta"]}, "overrides.0 = 'beta' is refused"),
        ({"based_on": "own", "overrides": ["objective.gamma=1"]}, "unknown key 'objective.gamma'"),
        ({"settings": {"name": "x"}}, "'model' is missing"),
    ],
)
def test_a_form_that_cannot_be_is_one_clear_line(store: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        experiment_of_form({"store": store, **given})


def test_every_field_of_the_form_is_a_setting_of_the_same_limits() -> None:
    """The title of a field is the setting that it sets, and what the form takes the setting takes."""
    schema, experiment = ExperimentForm.model_json_schema(), Experiment.model_json_schema()
    limits = {"type", "enum", "minimum", "exclusiveMinimum", "maximum"}
    checked = 0
    for field in ExperimentForm.model_fields.values():
        section, dot, key = str(field.title).partition(".")
        if dot:
            reference = experiment["properties"][section]["$ref"].rpartition("/")[2]
            setting = experiment["$defs"][reference]["properties"][key]
            (setting,) = (s for s in setting.get("anyOf", [setting]) if s.get("type") != "null")
            (mine,) = (f for f in schema["properties"].values() if f["title"] == field.title)
            assert {k: mine[k] for k in limits & mine.keys()} == {
                k: setting[k] for k in limits & setting.keys()
            }
            checked += 1
    assert checked == 8
