"""A reward's module named like a package of ours, like one of Python's, or given as a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.rewards import RewardConfig

SCORE = "VALUE = {value}\ndef score(batch): return [VALUE] * len(batch)\n"
#: Scores a row by the function named, then imports what is ours; prints the score and where ours comes from.
SCRIPT = """
import sys
{first}
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import make_reward, reward_identity
config = RewardConfig(kind="python", python={{"function": sys.argv[1]}})
reward_identity(config)
rows = [RewardRequest("p", n, (("user", "Q?"),), "a", None) for n in range(2)]
print(make_reward(config).score(rows)[1].reward)
import flows, tasks, tasks.interrupts, json
print(json.loads("1"), flows.__file__ == {flows!r})
"""


def score(folder: Path, function: str, first: str = "") -> float:
    """What a process of its own, started in `folder`, gives; our packages must be ours in it."""
    import flows

    script = SCRIPT.format(first=first, flows=flows.__file__)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, function],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    value, ours = done.stdout.splitlines()
    assert ours == "1 True"
    return float(value)


@pytest.mark.parametrize("first", ["", "import flows, tasks"])
@pytest.mark.parametrize("name", ["tasks", "flows", "qrpo_core", "json", "mine"])
def test_the_file_of_the_working_directory_is_the_users(tmp_path: Path, name: str, first: str) -> None:
    (tmp_path / f"{name}.py").write_text(SCORE.format(value=0.25))
    assert score(tmp_path, f"{name}:score", first) == 0.25


def test_a_package_of_the_users_named_like_ours_with_what_it_imports(tmp_path: Path) -> None:
    package = tmp_path / "tasks" / "deep"
    package.mkdir(parents=True)
    (tmp_path / "helper_of_rewards.py").write_text("HALF = 0.5\n")
    (package / "values.py").write_text("from helper_of_rewards import HALF\n")
    (package / "rewards.py").write_text(
        "from .values import HALF\ndef score(batch): return [HALF / 2] * len(batch)\n"
    )
    assert score(tmp_path, "tasks.deep.rewards:score") == 0.25
    (tmp_path / "tasks" / "__init__.py").write_text("WHOLE = 1.0\n")
    (package / "rewards.py").write_text(
        "from .. import WHOLE\ndef score(batch): return [WHOLE] * len(batch)\n"
    )
    assert score(tmp_path, "tasks.deep.rewards:score") == 1.0


def test_a_file_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "beside.py").write_text("VALUE = 0.75\n")
    (folder / "tasks.py").write_text(
        "from beside import VALUE\ndef score(batch): return [VALUE] * len(batch)\n"
    )
    assert score(tmp_path, "my rewards/tasks.py:score") == 0.75
    assert score(tmp_path, f"{folder}/tasks.py:score") == 0.75


def test_a_function_that_pickles_finds_its_module_in_a_fork(tmp_path: Path) -> None:
    """A reward that works in processes of its own does so under a private name as well."""
    (tmp_path / "tasks.py").write_text(
        "import multiprocessing\n"
        "def one(row): return float(len(row))\n"
        "def score(batch):\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "        return pool.map(one, [row.completion for row in batch])\n"
    )
    assert score(tmp_path, "tasks:score") == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [("nowhere.py:score", "no file nowhere.py"), ("tasks.py:other", "'other' does not exist")],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, message: str
) -> None:
    from qrpo_core.rewards.registry import check_ground_truths

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tasks.py").write_text(SCORE.format(value=1))
    with pytest.raises(ConfigError, match=message):
        check_ground_truths(RewardConfig(kind="python", python={"function": function}), [])
    assert os.getcwd() == str(tmp_path)
