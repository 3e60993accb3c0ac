"""A policy that lies in the cache stays there while a training reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.local_copies import make_room, mark
from qrpo_core.config import Experiment
from qrpo_core.pipeline import training
from tests.core.common.copies import age
from tests.core.pipeline.test_engine_copy import asked
from tests.core.small_experiment import precompute

__all__ = ["asked"]


def test_the_starting_policy_stays_until_the_training_has_ended(
    asked: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, _ = precompute(asked())
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QRPO_CACHE_GB", "0")
    entry = tmp_path / "cache" / "artifacts" / "start"
    mark(entry)
    shutil.copytree(steps.first.start.directory, entry / "policy")
    start = replace(steps.first.start, locate=lambda: entry / "policy")
    there = []

    def on_step(*given: Any) -> None:
        age(entry, 9)
        make_room(0)
        there.append(entry.exists())

    data = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    training.build(steps.workspace, steps.first.train_recipe, data, start, on_step)
    assert there
    assert all(there)
    age(entry, 9)
    make_room(0)
    assert not entry.exists()
