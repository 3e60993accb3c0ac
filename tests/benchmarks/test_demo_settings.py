"""Benchmarks that change experiments/demo.yaml: what they make of it is an experiment."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qrpo_core.config.reading import load_experiment
from tests.documents import ROOT

DEMO = ROOT / "experiments/demo.yaml"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_settings_of_the_benchmarks_are_valid(script: Any, tmp_path: Path) -> None:
    for model in (None, tmp_path):
        assert script("comparison_cost").experiment(tmp_path, model).training_data.mode == "pairs"
    assert script("orchestration").experiment(tmp_path, 8).sampling.engine == "fake"
    for budget in (4, 8):
        made = load_experiment(DEMO, script("top_up").settings(tmp_path, 48, budget))
        assert made.sampling.references_per_prompt == budget
    sampler = script("sampler_logprobs")
    for overrides in sampler.RUNS.values():
        assert load_experiment(DEMO, [*sampler.TINY, *overrides]).prompts.kind == "template"
    assert script("scale_out").experiment(tmp_path, 30.0).sampling.engine == "fake"
    _, experiment, *overrides = script("killed_run")._COMMAND
    assert load_experiment(ROOT / experiment, [each for each in overrides if each != "--set"])
    assert load_experiment(DEMO, [script("demo").TWICE])
