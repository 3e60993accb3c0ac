"""The container files name what there is: what can be checked without building them."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import pytest
import yaml
from prefect.settings import get_current_settings

from flows.service import workers
from flows.service.deploy import POOLS, ROOT

FOLDER = ROOT / "deployments/containers"
FILES = ("server", "worker-cpu", "worker-gpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction of a file: its keyword and the rest, continued lines joined."""
    text = (FOLDER / f"{name}.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in lines)]


def test_there_are_these_files() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {*(f"{n}.Dockerfile" for n in FILES), "compose.yaml"}
    assert set(POOLS) == {"cpu", "gpu"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_copies_what_there_is_and_does_not_run_as_root(name: str) -> None:
    found = instructions(name)
    images = {"worker-gpu": r"vllm/vllm-openai:v\d+\.\d+\.\d+"}
    # The base is an argument, so that a place without its registry can build on another.
    assert [keyword for keyword, _ in found[:2]] == ["ARG", "FROM"]
    assert re.fullmatch("BASE=" + images.get(name, r"python:3\.11-slim"), found[0][1])
    assert found[1][1] == "${BASE}"
    copied = [source for keyword, rest in found if keyword == "COPY" for source in rest.split()[:-1]]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    keywords = [keyword for keyword, _ in found]
    assert ("USER", "10001") in found
    assert keywords.index("USER") > max(i for i, keyword in enumerate(keywords) if keyword == "RUN")
    # What the copied packages import of each other is copied, too.
    for package in ("flows", "tasks", "qrpo_core"):
        if name != "server":
            assert package in copied
    assert "requirements.lock" in copied
    assert all("-c requirements.lock" in rest for _, rest in found if "pip install" in rest)


@pytest.mark.parametrize("name", FILES)
def test_a_file_starts_a_command_that_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = json.loads(dict(instructions(name))["CMD"])
    if name == "server":
        assert command == ["python", "-m", "flows.service.serve"]
        assert importlib.util.find_spec("flows.service.serve")
        return
    started: list[list[str]] = []
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, **_: started.append(command))
    workers._start("gpu 0", name.removeprefix("worker-"), {})
    *words, option, its_name = started[0][4:]
    assert option == "--name"
    assert its_name.endswith("-gpu-0")
    assert command == ["prefect", *words]  # what `make workers` starts, which other tests do
    # Its runs have the settings that `make workers` gives to its own.
    words = " ".join(rest for keyword, rest in instructions(name) if keyword == "ENV").split()
    assert workers._ENVIRONMENT.items() <= dict(word.split("=", 1) for word in words).items()
    known = get_current_settings().to_environment_variables(include_aliases=True)
    assert {word.split("=")[0] for word in words if word.startswith("PREFECT_")} <= set(known)


def test_the_composition_names_these_files() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    built = {service["build"]["dockerfile"] for service in services.values() if "build" in service}
    assert built == {f"deployments/containers/{name}.Dockerfile" for name in FILES}
    assert all((ROOT / file).is_file() for file in built)
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]  # no other machine reaches it
    for name in ("server", "worker-cpu", "worker-gpu"):  # and nobody without the password
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == (
            "${PREFECT_API_AUTH_STRING:?user:password}"
        )
