"""`qrpo push`: a finished run's policy in a directory and on a hub of loopback, by the hub's own client."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline import evaluation, training
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.core.inspection.fake_hub import TOKEN, FakeHub, fake_hub
from tests.core.small_experiment import precompute
from tests.core.stores import fill
from tests.flows.small import small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a training, and the command line many times

ROOT = Path(__file__).parents[3]
GOOD = ("--license", "apache-2.0", "--base-model", "org/tiny")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `small.yaml`, which is evaluated; trained with LoRA, so that there are adapters."""
    folder = tmp_path_factory.mktemp("finished")
    settings = small(tiny_model, folder / "store")
    settings["training"] = {"precision": "fp32", "batch_size": 8, "lora_rank": 2}
    settings["evaluation"] = {
        "samples_per_prompt": 2,
        "resamples": 200,
        "judges": {"brief": {"kind": "length", "max_words": 2}},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRPO_CACHE", str(folder / "cache"))
        steps, _ = precompute(load_experiment(str(folder / "small.yaml")))
        workspace, first = steps.workspace, steps.first
        ready = workspace.artifacts.get(first.training_set_recipe)
        training.build(workspace, first.train_recipe, ready, first.start)
        end = steps.after(first)
        for step in (*end.before, *end.after, *end.divergence):
            fill(workspace, step)
        evaluation.build(workspace, end)
        yield folder


Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def push(finished: Path) -> Push:
    """`qrpo push small.yaml ...` in a process of its own, which reads the hub's address when it starts."""

    def call(*arguments: str, hub: str = "", token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(finished / "hf"), "PYTHONPATH": str(ROOT)}
        environment |= {"HF_ENDPOINT": hub, "HF_TOKEN": token} if hub else {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "flows.cli", "push", "small.yaml", *arguments]
        return subprocess.run(
            command, cwd=finished, env=environment, capture_output=True, text=True, check=False
        )

    return call


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as found:
        yield found


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


def test_a_directory_with_the_weights_and_a_card_that_others_read(
    push: Push, finished: Path, tiny_model: Path, hub: FakeHub
) -> None:
    done = push("--to", "shared", *GOOD)
    assert done.returncode == 0, done.stderr
    assert "hf upload OWNER/NAME shared" in done.stdout
    shared = finished / "shared"
    workspace = Workspace(load_experiment(str(finished / "small.yaml")))
    steps = stored_steps(workspace)
    policy = workspace.artifacts.folder(workspace.artifacts.get(steps.first.train_recipe), "policy")
    assert (shared / "model.safetensors").read_bytes() == (policy / "model.safetensors").read_bytes()
    card = ModelCard.load(shared / "README.md")
    assert hub.problem(card.content) == ""
    assert (card.data.base_model, card.data.license) == ("org/tiny", "apache-2.0")
    values = {each.metric_type: each.metric_value for each in card.data.eval_results}
    result = workspace.artifacts.get(steps.after(steps.first).evaluate).facts["result"]
    assert values["reward"] == round(result["after"]["reward"]["value"], 6)
    assert values["kl"] == round(result["kl"]["value"], 6)
    assert values["judge_brief"] == round(result["judges"]["brief"]["after"]["value"], 6)
    for place in (finished, tiny_model):  # no path of this machine goes to others
        for path in (path for path in shared.rglob("*") if path.suffix in (".json", ".md")):
            assert str(place) not in path.read_text(encoding="utf-8"), path
    adapter = json.loads((shared / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"
    assert "exists already" in one_line(push("--to", "shared", *GOOD))


def test_the_cards_snippet_runs(push: Push, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert push("--to", "snippet", *GOOD).returncode == 0
    (code,) = re.findall(r"```python\n(.*?)```", (finished / "snippet" / "README.md").read_text(), re.S)
    monkeypatch.chdir(finished)
    exec(compile(code, "README.md", "exec"), {})


def test_pushed_in_one_commit_private_and_checked_first(push: Push, finished: Path, hub: FakeHub) -> None:
    done = push("--repo", "me/tiny-qrpo", *GOOD, hub=hub.url)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/tiny-qrpo" in done.stdout
    files = hub.files["me/tiny-qrpo"]
    assert hub.private == {"me/tiny-qrpo": True}
    assert {"README.md", "model.safetensors", "config.json", "adapter/adapter_config.json"} <= set(files)
    assert hub.objects  # the weights went as a large file
    assert 'model="me/tiny-qrpo"' in files["README.md"].decode()
    assert [each for each in hub.asked if "/commit/" in each] == ["/api/models/me/tiny-qrpo/commit/main"]
    assert push("--repo", "me/tiny-qrpo", *GOOD, hub=hub.url).returncode == 0  # again: the same repository
    assert push("--repo", "me/open", "--public", *GOOD, hub=hub.url).returncode == 0
    assert hub.private == {"me/tiny-qrpo": True, "me/open": False}


def test_a_card_that_the_hub_refuses_creates_nothing(push: Push, hub: FakeHub) -> None:
    text = one_line(push("--repo", "me/x", "--license", "gpl-9", "--base-model", "org/tiny", hub=hub.url))
    assert 'the hub refuses the card: "license" must be one of apache-2.0' in text
    assert (hub.private, hub.files) == ({}, {})


def test_what_cannot_be_pushed_is_one_line(push: Push, hub: FakeHub) -> None:
    with socket.socket() as probe:  # bound and not listening: refuses
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
        cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
            (("--repo", "me/x", *GOOD), {"hub": closed}, "no answer within"),
            (("--repo", "me/x", *GOOD), {"hub": hub.url, "token": "wrong"}, "the hub answers 401"),
            (("--repo", "me/x", *GOOD), {"hub": hub.url, "token": ""}, "no token"),
            (("--repo", "me/x", *GOOD), {}, "HF_HUB_OFFLINE"),
            (("--repo", "x", *GOOD), {}, "OWNER/NAME"),
            (("--to", "y", "--license", "mit"), {}, "--base-model"),
            (("--to", "y", "--license", "mit", "--base-model", "a b"), {}, "no model of a hub"),
            (("--to", "y", "--license", "My own"), {}, "no licence id"),
        ]
        for arguments, how, says in cases:
            assert says in one_line(push(*arguments, **how)), arguments
    assert hub.private == {}


def test_without_a_base_model_on_a_hub_the_card_names_none(push: Push, finished: Path) -> None:
    assert push("--to", "none", "--license", "other", "--base-model", "none").returncode == 0
    assert ModelCard.load(finished / "none" / "README.md").data.base_model is None
