"""Each extra brings what its features import, the core does without any, and what is missing is named."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrpo_core.common.extras import EXTRA_OF
from tests.extras.hiding import (
    ROOT,
    VARIABLE,
    all_but,
    allowed,
    canonical,
    declared,
    distributions_of,
    hidden,
    installed_by,
)
from tests.flows.small import small

pytestmark = pytest.mark.slow

#: Modules of the core that only a store in S3 needs.
S3 = {"qrpo_core.store.backends.s3", "qrpo_core.store.backends.s3_errors"}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run() -> Run:
    """Runs a program where only the core and some extras are installed."""
    known: dict[tuple[str, ...], str] = {}

    def run(extras: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
        if extras not in known:
            known[extras] = json.dumps(hidden(extras))
        path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
        environment = {**os.environ, VARIABLE: known[extras], "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def modules_of(*packages: str) -> list[str]:
    """Every module of some packages but those that are programs of children with another Python."""
    files = sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files
    ]
    return [name for name in names if not name.endswith("__main__")]


def imports(modules: list[str], *absent: str) -> str:
    return f"""
        import importlib, sys
        for name in {modules}:
            importlib.import_module(name)
        for name in {absent}:
            assert name not in sys.modules, name
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            raise AssertionError(f"{{name}} is not hidden")
    """


def test_the_core_imports_without_any_extra(run: Run) -> None:
    modules = [name for name in modules_of("qrpo_core") if name not in S3]
    done = run((), imports(modules, *EXTRA_OF))
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_trainer_trains_without_any_extra(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    program = f"""
        import sys
        from transformers import AutoModelForCausalLM, TrainingArguments
        from qrpo_core.config import ObjectiveConfig
        from qrpo_core.data.collator import Example
        from qrpo_core.training.trainer import QRPOTrainer
        model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})
        example = Example([1, 2], [3, 4], ref_logprob=-9.0)
        arguments = TrainingArguments({str(tmp_path)!r}, use_cpu=True, max_steps=1, report_to=[])
        QRPOTrainer(model, arguments, [example], objective=ObjectiveConfig()).train()
        assert "prefect" not in sys.modules
    """
    done = run((), program)
    assert done.returncode == 0, done.stderr


#: Settings beside those of the small experiment, and the extra that they need.
NEEDS = {
    "sentiment": ({"reward": {"kind": "sentiment"}}, "rewards"),
    "tasks": ({"prompts": {"kind": "reasoning_gym", "task": "basic_arithmetic", "size": 5}}, "rewards"),
    "store": ({"store": {"path": "s3://bucket/store"}}, "pipeline"),
    "prompts": ({"prompts": {"kind": "file", "path": "s3://bucket/a.jsonl"}}, "pipeline"),
}


def test_a_missing_extra_is_one_line_before_anything_is_written(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    """Of `qrpo run` and `qrpo plan`; a plan needs no package of the training."""
    settings: dict[str, Any] = small(tiny_model, tmp_path / "store")
    plain = write(tmp_path / "plain.yaml", settings)
    commands = {"run": ["run", plain], "plan": ["plan", plain], "doctor": ["doctor"]}
    commands["lora"] = ["plan", write(tmp_path / "lora.yaml", settings | {"training": {"lora_rank": 4}})]
    for name, (changes, _) in NEEDS.items():
        commands[name] = ["plan", write(tmp_path / f"{name}.yaml", settings | changes)]
    program = f"""
        import contextlib, io, json
        from flows.cli.main import main
        said = {{}}
        for name, command in {commands}.items():
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main(command)
                except SystemExit as end:
                    said[name] = end.code, out.getvalue(), err.getvalue()
        print("\\n" + json.dumps(said))
    """
    done = run((), program)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name, extra in [("run", "pipeline"), *((name, extra) for name, (_, extra) in NEEDS.items())]:
        status, out, err = said[name]
        assert (status, out, len(err.splitlines())) == (2, "", 1), (name, said[name])
        assert err.endswith(f": pip install 'qrpo[{extra}]'\n"), err
    assert said["plan"][0] == said["lora"][0] == 0, (said["plan"], said["lora"])
    assert "pip install 'qrpo[pipeline,rewards,lora,gguf,ray,wandb,tensorboard,mlflow]'" in said["doctor"][1]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("module", ["serve", "deploy", "workers"])
def test_a_service_without_the_pipeline_is_one_line(run: Run, module: str) -> None:
    done = run((), f"import runpy; runpy.run_module('flows.service.{module}', run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr.endswith("needs the package prefect: pip install 'qrpo[pipeline]'\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_server_runs_with_what_its_container_installs(tmp_path: Path) -> None:
    """Its modules and its pages, in a Python that has the packages of server.Dockerfile alone."""
    container = (ROOT / "deployments/containers/server.Dockerfile").read_text()
    (line,) = re.findall(r"^RUN pip install --no-cache-dir -c requirements.lock (.*)$", container, re.M)
    program = f"""
        import asyncio, httpx, sys
        import flows.service.serve
        from flows.service.pages import with_pages
        async def page():
            pages = httpx.ASGITransport(app=with_pages(None, [{str(tmp_path)!r}]))
            client = httpx.AsyncClient(transport=pages)
            found = await client.get("http://server/qrpo/runs")
            assert "No run." in found.text, found.text
        asyncio.run(page())
        import s3fs
        assert "torch" not in sys.modules
    """
    environment = {
        **os.environ,
        VARIABLE: json.dumps(all_but(installed_by(line.split()))),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_extra_pipeline_imports_flows_and_tasks(run: Run) -> None:
    modules = [*modules_of("tasks", "flows"), *sorted(S3)]
    done = run(("pipeline",), imports(modules, "vaderSentiment", "reasoning_gym", "peft", "ray"))
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_extra_rewards_scores_and_draws(run: Run) -> None:
    program = """
        from qrpo_core.config import PromptsConfig, RewardConfig
        from qrpo_core.data.generated import draw_tasks
        from qrpo_core.rewards.base import RewardRequest
        from qrpo_core.rewards.registry import make_reward
        from collections import Counter
        from dataclasses import astuple
        import json, sys
        (row,) = draw_tasks(PromptsConfig(kind="reasoning_gym", task="basic_arithmetic", size=1), Counter())
        task = astuple(row)[2]
        for kind, text, truth in (
            ("sentiment", "wonderful", None),
            ("math", r"\\boxed{1/2}", "0.5"),
            ("reasoning_gym", task["entry"]["answer"], task),
        ):
            reward = make_reward(RewardConfig(kind=kind))
            (score,) = reward.score([RewardRequest("0" * 32, 0, (), text, json.dumps(truth))])
            assert score.reward > 0.5, (kind, score)
            reward.close()
        assert "prefect" not in sys.modules
    """
    done = run(("rewards",), program)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_extra_lora_trains_adapters(run: Run, tiny_model: Path) -> None:
    program = f"""
        from transformers import AutoModelForCausalLM
        from qrpo_core.config import TrainingConfig
        from qrpo_core.training.lora import add_adapters
        model = AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})
        assert add_adapters(model, TrainingConfig(lora_rank=2)).peft_config
    """
    done = run(("lora",), program)
    assert done.returncode == 0, done.stderr


def test_the_extra_gguf_is_found(run: Run) -> None:
    done = run(("gguf",), "from qrpo_core.common.extras import require; require('gguf', 'a model')")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_remedy_names_the_extra_that_has_the_package(package: str) -> None:
    by_module = distributions_of()
    unseen = [package, f"{package}-skinny"]  # MLflow's package without its server has the same module
    names = {canonical(each) for each in by_module.get(package, unseen)}
    requirements = {canonical(text.split("[")[0].split(">")[0]) for text in declared(EXTRA_OF[package])}
    assert names & requirements


def test_everything_imported_is_declared() -> None:
    """Each distribution whose modules our source imports is a requirement of pyproject.toml by name."""
    extras = ("pipeline", "rewards", "lora", "gguf", "ray", "vllm", "alpaca-eval")
    texts = [text for extra in (None, *extras) for text in declared(extra)]
    names = {canonical(text.split("[")[0].split(">")[0].split("<")[0].strip()) for text in texts}
    by_module = distributions_of()
    missing = {
        f"{module} in {file.relative_to(ROOT)}"
        for package in ("qrpo_core", "tasks", "flows")
        for file in (ROOT / package).rglob("*.py")
        for module in imported(ast.parse(file.read_text()))
        if not {canonical(each) for each in by_module.get(module, [module])} & names
    }
    assert not missing


def test_the_core_declares_what_it_imports_at_the_top() -> None:
    """Guards the other tests: hiding must know what the core's own requirements bring."""
    assert {"torch", "transformers", "numpy", "pyarrow"} <= allowed(())
    assert not {"prefect", "matplotlib", "peft", "reasoning-gym", "pytest"} & allowed(())


def test_the_sizes_in_the_documents_are_the_benchmarks() -> None:
    page = (ROOT / "docs/reference/extras.md").read_text()
    measured = json.loads((ROOT / "benchmarks/results/install_sizes.json").read_text())["installs"]
    for row in measured:
        name = row["extra"] if row["extra"] == "none" else f"`{row['extra']}`"
        (line,) = (each for each in page.splitlines() if each.startswith(f"| {name} |"))
        assert line.endswith(f"| {row['MiB']:,} | {row['packages']} |"), line


def imported(tree: ast.Module) -> set[str]:
    """The packages of others that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"qrpo_core", "tasks", "flows"}


def write(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)
