"""The documents and the code hold each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from qrpo_core.config import Experiment, RewardConfig, Section, WeightedTerm
from qrpo_core.rewards.config import ThinkingMarks

ROOT = Path(__file__).parents[2]


def sections() -> dict[str, type[Section]]:
    found = {"experiment": Experiment, "reward.terms": WeightedTerm, "reward.thinking": ThinkingMarks}
    for name, field in Experiment.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    for name, field in RewardConfig.model_fields.items():
        for kind in get_args(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section) and kind is not WeightedTerm:
                found[f"reward.{name}"] = kind
    return found


def test_every_field_is_documented_and_every_documented_field_exists() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## `([a-z_.]+)`\n(.*?)(?=^## |\Z)", text, re.S | re.M))
    assert parts.keys() == sections().keys()
    for name, section in sections().items():
        documented = set(re.findall(r"^\| `(\w+)`", parts[name], re.M))
        assert documented == set(section.model_fields), name


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "plan",
        "show",
        "report",
        "config",
        "explain",
        "budget",
        "ls",
        "verify",
        "gc",
        "compact",
        "doctor",
    ],
)
def test_every_command_is_documented(command: str) -> None:
    assert f"qrpo {command}" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_cases_name_tests_that_exist() -> None:
    named = re.findall(
        r"`((?:core|flows|deployments)/[^`]*)`", (ROOT / "docs" / "cases.md").read_text("utf-8")
    )
    assert len(named) > 15
    assert [path for path in named if not (ROOT / "tests" / path).is_file()] == []


def test_no_python_file_is_longer_than_350_lines() -> None:
    files = [path for top in ("flows", "tasks", "qrpo_core") for path in (ROOT / top).rglob("*.py")]
    long = {str(path): count for path in files if (count := len(path.read_text().splitlines())) > 350}
    assert not long


def test_the_table_of_faults_is_the_benchmarks() -> None:
    outcomes = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())["outcomes"]
    names = ("fault", "back_end", "injected", "bought", "lost", "twice", "in_flight", "destroyed", "wrong")
    rows = [
        "| " + " | ".join(str(each[name]) for name in names) + " |" for each in outcomes if each["injected"]
    ]
    assert "\n".join(rows) in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert {each["back_end"] for each in outcomes} == {"directory", "S3"}
    assert all(each["lost"] == each["wrong"] == 0 for each in outcomes)
    assert all(each["twice"] == each["in_flight"] + each["destroyed"] for each in outcomes)


def test_the_table_of_rounded_policies_is_the_benchmarks() -> None:
    rates = json.loads((ROOT / "benchmarks" / "results" / "saved_precision.json").read_text())["rates"]
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert [each["learning_rate"] for each in rates] == [1e-6, 1e-5, 1e-4]
    for each in rates:
        share, off = (each["trained_rows"][name] for name in ("share", "noise_nats"))
        cells = [f"{100 * share[way]:.1f} %, {off[way]:.3g} nats off" for way in ("nearest", "stochastic")]
        exponent = f"{each['learning_rate']:.0e}".replace("e-0", "e-")
        ratio = each["trained_rows"]["mean_log_ratio_nats"]
        assert f"| {exponent} | {ratio:.3g} | {cells[0]} | {cells[1]} |" in text
        assert abs(share["stochastic"] - 1) <= 0.1, "what is shipped keeps the training"


def test_the_readmes_demo_is_the_benchmarks() -> None:
    """Every line of the README's first blocks was printed by the run that the result file records."""
    found = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text[text.index("`make demo` creates") :], flags=re.DOTALL)[:3]
    for block, command in zip(blocks, ("run", "again", "plan"), strict=True):
        printed = {line.rstrip() for name in ("stages", "lines") for line in found[command][name]}
        quoted = [line.rstrip() for line in block.splitlines() if line.strip() not in ("", "…")]
        assert len(quoted) > 5
        assert not [line for line in quoted if line not in printed]
    assert any("survived" in line for line in found["run"]["lines"])
    assert any("float32 arithmetic" in line for line in found["run"]["lines"])
