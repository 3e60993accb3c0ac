"""The files that an experiment takes along, and what a machine elsewhere makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.input_files import Carried, by_content, carry, located
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.store.backends.opening import open_objects
from tests.core.small_experiment import precompute, settings

__all__ = ["settings"]

REWARD = {"kind": "python", "python": {"function": "mine:score"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with data and a reward of two modules; the working directory is another one."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(12)))
    (folder / "mine.py").write_text("import beside\n\n\ndef score(batch):\n    return beside.all_of(batch)\n")
    (folder / "beside.py").write_text("def all_of(batch):\n    return [len(r.completion) for r in batch]\n")
    return folder


def taken(settings: dict[str, Any], folder: Path, **sections: Any) -> Carried:
    prompts = {"kind": "file", "path": "rows.jsonl", "held_out": 0.3}
    experiment = parse_experiment({**settings, "prompts": prompts, "reward": REWARD} | sections)
    return carry(experiment, open_objects(experiment.store), (folder, Path.cwd()))


def test_a_machine_without_the_files_computes_the_same(
    settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = taken(settings, folder)
    assert [file.name for file in carried.files] == ["rows.jsonl", "mine.py"]
    sent = Experiment.model_validate(json.loads(carried.experiment.model_dump_json()))
    assert str(folder) not in sent.model_dump_json()
    monkeypatch.chdir(folder)
    prompts = {"kind": "file", "path": "rows.jsonl", "held_out": 0.3}
    steps, _ = precompute(parse_experiment({**settings, "prompts": prompts, "reward": REWARD}))
    monkeypatch.chdir("/")
    shutil.rmtree(folder)
    there = stored_steps(Workspace(sent))
    # The same recipes: what the user's own machine has computed is reused.
    assert there.first.training_set_recipe == steps.first.training_set_recipe
    reward = there.workspace.reward()
    (score,) = reward.score([RewardRequest("p", 0, (("user", "Say 1"),), "four", None)])
    assert score.reward == 4.0
    # It sends on what it got, not the places on its disk.
    assert there.workspace.given == sent
    assert there.workspace.experiment != sent


def test_files_are_taken_wherever_an_experiment_names_them(settings: dict[str, Any], folder: Path) -> None:
    weighted = {"kind": "weighted", "terms": [{"weight": 1.0, "reward": REWARD}]}
    benchmark = {"prompts": {"kind": "file", "path": "rows.jsonl"}, "reward": REWARD}
    evaluation = {"judges": {"other": REWARD}, "benchmarks": {"own": benchmark}}
    carried = taken(settings, folder, reward=weighted, evaluation=evaluation)
    sent = carried.experiment
    own = sent.evaluation.benchmarks["own"]
    assert own.prompts.path == sent.prompts.path
    assert own.prompts.path is not None
    assert own.prompts.path.startswith("store:inputs/")
    rewards = [sent.reward.terms[0].reward, sent.evaluation.judges["other"], own.reward]
    (module,) = {reward.python.file for reward in rewards if reward.python is not None}
    assert module is not None
    assert module.endswith("/mine.py")
    assert (
        located(sent, open_objects(sent.store)).evaluation.benchmarks["own"].prompts.path != own.prompts.path
    )


def test_what_is_no_local_file_stays_as_it_is(settings: dict[str, Any], folder: Path) -> None:
    prompts = {"kind": "file", "path": "s3://bucket/rows.jsonl"}
    installed = {"kind": "python", "python": {"function": "json:loads"}}
    sent = taken(settings, folder, prompts=prompts, reward=installed, model={"path": "org/model"}).experiment
    assert sent.prompts.path == "s3://bucket/rows.jsonl"
    assert sent.reward.python is not None
    assert sent.reward.python.file is None
    assert sent.model.path == "org/model"


def test_a_model_stays_and_is_named_by_its_absolute_path(settings: dict[str, Any], folder: Path) -> None:
    (folder / "model").mkdir()
    carried = taken(settings, folder, model={"path": "model"})
    assert carried.experiment.model.path == str(folder / "model")
    assert carried.local == {str(folder / "model"): "model.path"}


def test_a_module_that_cannot_travel_is_named_by_its_own_file(
    settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "package").mkdir()
    (folder / "package" / "own.py").write_text("from . import other\n")
    python = {"kind": "python", "python": {"function": "package.own:score"}}
    weighted = {"kind": "weighted", "terms": [{"weight": 1.0, "reward": python}]}
    named = "reward.terms.0.reward.python.file"

    def kept() -> dict[str, str]:
        return by_content(parse_experiment({**settings, "reward": weighted}))

    before = kept()[named]
    assert before.endswith("/own.py")
    (folder / "package" / "own.py").write_text("from . import another\n")
    assert kept()[named] != before
    monkeypatch.chdir("/")
    assert named not in kept()  # no such module here


@pytest.mark.parametrize(
    ("prompts", "function", "files", "says"),
    [
        ("none.jsonl", "mine:score", {}, r"no file 'none.jsonl' in /.*\[prompts.path\]: give the path"),
        ("rows.jsonl", "none.py:score", {}, r"no file 'none.py'.*reward.python.function"),
        ("rows.jsonl", "mine:score", {"mine.py": "def"}, r"not Python: .*mine.py:1"),
        ("rows.jsonl", "mine:score", {"mine.py": "from . import a"}, r"relative import.*mine.py:1"),
        (
            "rows.jsonl",
            "own.mine:score",
            {"own/mine.py": ""},
            r"'own.mine' is a package.*own/mine.py:function",
        ),
    ],
)
def test_what_cannot_travel_is_one_clear_line(
    settings: dict[str, Any], folder: Path, prompts: str, function: str, files: dict[str, str], says: str
) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    reward = {"kind": "python", "python": {"function": function}}
    with pytest.raises(ConfigError, match=says):
        taken(settings, folder, prompts={"kind": "file", "path": prompts}, reward=reward)


def test_two_files_of_one_name_are_refused_unless_they_are_equal(
    settings: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(folder / "rows.jsonl", tmp_path / "rows.jsonl")
    assert taken(settings, folder).experiment.prompts.path
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"there are two files 'rows.jsonl'.*absolute path"):
        taken(settings, folder)


def test_a_package_beside_the_module_travels_and_the_project_does_not(
    settings: dict[str, Any], folder: Path
) -> None:
    for name in ("own/deep/c.py", "own/__init__.py", "flows/x.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "mine.py").write_text("import own.deep.c, flows.x\n\n\ndef score(batch):\n    return batch\n")
    sent = taken(settings, folder).experiment
    assert sent.reward.python is not None
    assert sent.reward.python.file is not None
    kept = open_objects(sent.store).keys(
        sent.reward.python.file.removeprefix("store:").rpartition("/")[0] + "/"
    )
    assert sorted(key.split("/", 2)[2] for key in kept) == ["mine.py", "own/__init__.py", "own/deep/c.py"]
