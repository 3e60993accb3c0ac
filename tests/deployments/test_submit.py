"""`qrpo submit` and `qrpo schedule` on a real server, with workers that run in another directory."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from flows.cli.submit import _show
from flows.service.schedules import _in_form
from flows.service.server import PrefectServer
from flows.service.submissions import watch
from qrpo_core.common.errors import QRPOError
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.input_files import carry
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.opening import open_objects
from tests.deployments.api import ask, references, request
from tests.flows.small import call

REWARD = """
import beside


def score(batch, *, most):
    return [beside.short(row.completion, most) for row in batch]
"""


@pytest.fixture
def user(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's experiment in a folder with its data and its reward; the shell is in another folder."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"q": f"Say {n}"}) + "\n" for n in range(20)))
    (folder / "mine.py").write_text(REWARD)
    (folder / "beside.py").write_text("def short(text, most):\n    return float(len(text.split()) <= most)\n")
    shutil.copytree(tiny_model, folder / "model")
    experiment = {
        "model": {"path": "model", "dtype": "float32"},
        "prompts": {"kind": "file", "path": "rows.jsonl", "prompt_field": "q"},
        "sampling": {"engine": "fake", "references_per_prompt": 3, "max_new_tokens": 12},
        "reward": {"kind": "python", "python": {"function": "mine:score", "arguments": {"most": 1}}},
        "store": {"path": "store"},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    return folder / "own.yaml"


@pytest.mark.slow
def test_a_worker_elsewhere_computes_with_the_users_data_and_reward(
    server: PrefectServer, workers: Path, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiment(user, ["sampling.references_per_prompt=4"])
    kept = carry(experiment, open_objects(experiment.store), (user.parent,)).experiment
    workspace = Workspace(kept)
    prompts.build(workspace, prompts.recipe(workspace))  # a top-up needs them
    asked = [
        "submit",
        str(user),
        "--flow",
        "top-up",
        "--watch",
        "--set",
        "sampling.references_per_prompt=4",
    ]
    assert call(*asked) == 0, workers.read_text()
    printed = capsys.readouterr().out
    found = re.search(rf"URL: {server.ui_url}/v2/runs/flow-run/(\S+)\n", printed)  # the UI as it opens
    assert found, printed
    run = ask(server, "GET", f"/flow_runs/{found[1]}")
    assert run["state"]["type"] == "COMPLETED"
    assert run["name"] == "top-up own · model · rows.jsonl · n=4"
    assert f"Travels: {user.parent}/mine.py" in printed
    assert f"Store: {Path.cwd()}/store (workers need this folder)" in printed
    assert re.search(r"sample references +\d+ rows computed", printed)
    assert "Worker" not in printed
    assert set(references(kept)) == {4}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["COMPLETED", "CRASHED"])
def test_a_log_that_arrives_after_the_end_is_shown(server: PrefectServer, state: str) -> None:
    flow = ask(server, "POST", "/flows/", name="late")["id"]
    run = ask(server, "POST", "/flow_runs/", flow_id=flow, state={"type": state})["id"]
    lines = ["sample references: 9 rows computed", "Finished in state Completed()"]
    logged = [
        {
            "name": "qrpo",
            "level": 20,
            "message": line,
            "timestamp": f"2026-01-01T00:00:0{n}Z",
            "flow_run_id": run,
        }
        for n, line in enumerate(lines)
    ]
    later = threading.Timer(3.0, lambda: request(server.url, "POST", "/logs/", logged))  # type: ignore[arg-type]
    said: list[str] = []
    later.start()
    if state == "COMPLETED":
        watch(server.url, UUID(run), said.append)
        assert said == lines[:1]
    else:  # a process that crashed says nothing more
        with pytest.raises(QRPOError, match="Crashed"):
            watch(server.url, UUID(run), said.append)
    later.join()


@pytest.mark.slow
def test_a_run_that_fails_says_why(
    server: PrefectServer, workers: Path, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("submit", str(user), "--set", "sampling.references_per_prompt=1", "--watch") == 1
    assert "sampling.references_per_prompt = 1 is too few" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_has_the_parameters_of_its_deployment_and_its_variants(
    server: PrefectServer, deployed: str, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("submit", str(user), "--vary", "objective.beta=0.1,0.3") == 2
    assert "need --flow compare" in capsys.readouterr().err
    assert call("submit", str(user), "--flow", "precompute") == 0
    run = capsys.readouterr().out.partition("/runs/flow-run/")[2].split()[0]
    ask(server, "POST", f"/flow_runs/{run}/set_state", state={"type": "CANCELLED"}, force=True)
    assert ask(server, "GET", f"/flow_runs/{run}")["parameters"]["pool"] == "gpu"  # the deployment's own
    assert call("submit", str(user), "--flow", "compare", "--vary", "objective.beta=0.1,0.3") == 0
    run = capsys.readouterr().out.partition("/runs/flow-run/")[2].split()[0]
    ask(server, "POST", f"/flow_runs/{run}/set_state", state={"type": "CANCELLED"}, force=True)
    assert ask(server, "GET", f"/flow_runs/{run}")["parameters"]["comparison"]["vary"] == [
        "objective.beta=0.1,0.3"
    ]


@pytest.mark.slow
def test_what_cannot_be_submitted_starts_no_run(
    server: PrefectServer, deployed: str, user: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    before = len(ask(server, "POST", "/flow_runs/filter"))
    for arguments, says in (
        (("--set", "prompts.path=none.jsonl"), "no file 'none.jsonl'"),
        (("--set", "reward.python.function=none.py:score"), "no file 'none.py'"),
        (("--set", "objective.beta=-1"), "objective.beta"),
    ):
        assert call("submit", str(user), *arguments) == 2
        assert says in capsys.readouterr().err
    assert len(ask(server, "POST", "/flow_runs/filter")) == before
    assert not (user.parent.parent / "store").exists()


@pytest.mark.slow
def test_a_schedule_is_made_shown_paused_resumed_and_removed(
    server: PrefectServer,
    deployed: str,
    deploy: Callable[[], str],
    user: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def shown(*arguments: str) -> str:
        assert call("schedule", *arguments) == 0
        return capsys.readouterr().out

    def standing() -> list[tuple[str, bool, int]]:
        found = ask(server, "GET", "/deployments/name/top-up/top-up")["schedules"]
        given = [s["parameters"]["experiment"]["settings"]["sampling"] for s in found]
        counts = [each["references_per_prompt"] for each in given]
        return [(s["schedule"]["cron"], s["active"], n) for s, n in zip(found, counts, strict=True)]

    store = f"{Path.cwd()}/store"
    nothing = f"No schedule of experiment 'own' with store {store} on {server.url}."
    assert f"{nothing} Make one" in shown(str(user))
    assert f"No schedule on {server.url}." in shown()
    made = shown(str(user), "--cron", "0 2 * * *", "--timezone", "Europe/Zurich")
    deployment = ask(server, "GET", "/deployments/name/top-up/top-up")["id"]
    assert f"URL: {server.ui_url}/v2/deployments/deployment/{deployment}\n" in made
    assert standing() == [("0 2 * * *", True, 3)]
    # Again: changed, not doubled. Another experiment has its own.
    shown(str(user), "--cron", "30 3 * * 1", "--set", "sampling.references_per_prompt=9")
    shown(str(user), "--cron", "0 4 * * *", "--set", "name=other")
    assert sorted(standing()) == [("0 4 * * *", True, 3), ("30 3 * * 1", True, 9)]
    assert re.search(r"own +top-up +30 3 \* \* 1 +UTC +active", shown(str(user)))
    assert "other" not in shown(str(user))
    assert re.search(r"own .*\n", everything := shown())
    assert "other" in everything
    assert "paused" in shown(str(user), "--pause")
    deploy()  # keeps them, paused ones as well
    assert sorted(standing()) == [("0 4 * * *", True, 3), ("30 3 * * 1", False, 9)]
    assert "active" in shown(str(user), "--resume")
    assert call("schedule", str(user), "--pause", "--flow", "align") == 2
    refused = capsys.readouterr().err
    assert all(part in refused for part in ("'own'", "'align'", server.url, "--flow top-up"))
    assert f"top-up other, 0 4 * * * (UTC), store {store}" in refused
    removed = shown(str(user), "--remove")
    assert f"Removed: top-up own, 30 3 * * 1 (UTC), store {store}\n{nothing} The 1 there" in removed
    assert "other" in removed
    assert call("schedule", str(user), "--remove") == 2
    assert "experiment 'own' with store" in capsys.readouterr().err
    shown(str(user), "--remove", "--set", "name=other")
    assert standing() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cron", "* * * * * *"), "has not five fields"),
        (("--cron", "61 * * * *"), "--cron '61 * * * *' is refused"),
        (("--cron", "0 2 * * *", "--timezone", "Zurich"), "--timezone 'Zurich' is refused"),
        (("--pause",), "has no schedule of the deployment 'top-up'"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_clear_line(
    server: PrefectServer,
    deployed: str,
    user: Path,
    arguments: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("schedule", str(user), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_without_a_server_nothing_is_stored(
    user: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import temporary_settings

    closed: dict[Any, Any] = {"api.url": "http://127.0.0.1:9/api"}
    with temporary_settings(closed):
        assert call("submit", str(user)) == 2
    assert "no Prefect server answers at http://127.0.0.1:9/api" in capsys.readouterr().err
    assert {path.name for path in user.parent.parent.iterdir()} == {"user"}


def test_a_schedule_of_an_older_version_gets_a_form_around_its_settings() -> None:
    old = {"experiment": {"name": "own", "prompts": {"kind": "file"}}, "pool": None}
    assert _in_form(old) == (new := {"experiment": {"settings": old["experiment"]}, "pool": None})
    assert _in_form(new) == new
    assert _in_form({"experiment": (form := {"based_on": "own"})}) == {"experiment": form}
    assert _in_form(None) == {}


def test_the_result_of_a_submission_is_named_with_its_options() -> None:
    asked = argparse.Namespace(experiment="my.yaml", set=["objective.beta=0.3"], store=None)
    assert _show(asked) == "qrpo show my.yaml --set objective.beta=0.3"
    asked.store = "/the store"
    assert _show(asked) == "qrpo show my.yaml --set objective.beta=0.3 --store '/the store'"


def test_a_schedule_needs_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schedule", "--cron", "0 2 * * *") == 2
    assert "belongs to an experiment" in capsys.readouterr().err


def test_stored_inputs_are_listed_and_kept(user: Path) -> None:
    from qrpo_core.maintenance.contents import list_store

    experiment = load_experiment(user)
    objects = open_objects(experiment.store)
    carry(experiment, objects, (user.parent,))
    assert len(list_store(objects).loose["inputs"]) == 3
