"""`qrpo gc`, `ls` and `verify` know the checkpoints of trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from qrpo_core.config import Experiment
from qrpo_core.maintenance.in_use import known_steps
from qrpo_core.maintenance.listing import listing
from qrpo_core.maintenance.verify import verify
from qrpo_core.pipeline.training import checkpoint_recipe
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.checkpoint_store import CheckpointStore
from qrpo_core.training.checkpoints import seal
from tests.core.small_experiment import changed
from tests.core.stores import collect, sweep

Stages = Callable[[Experiment], Iterator[str]]


def checkpointed(experiment: Experiment, number: int, scratch: Path) -> CheckpointStore:
    """The checkpoints of a round's training, which has one in the store."""
    made = scratch / f"checkpoint-{number}"
    made.mkdir()
    (made / "state").write_bytes(b"1")
    seal(made, {})
    recipe = known_steps(Workspace(experiment)).round(number).train_recipe
    stored = CheckpointStore(experiment.store, checkpoint_recipe(recipe))
    assert stored.put(made, 1)
    return stored


def test_checkpoints_stay_until_their_policy_is_committed(
    settings: dict[str, Any], other: Experiment, stages: Stages, tmp_path: Path
) -> None:
    experiment = changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    list(stages(other))
    running = stages(experiment)
    for number in (1, 2):
        while next(running) != "assemble training set":
            pass
        stored = checkpointed(experiment, number, tmp_path)
        assert sweep(experiment, other) == []
        in_bfloat16 = changed(
            settings, rounds=experiment.rounds.model_dump(), training={"save_dtype": "bfloat16"}
        )
        assert [each for each in collect(in_bfloat16, experiment) if "checkpoints" in each.what] == []
        # Other experiments know nothing of it: only its age protects it from them.
        assert [each.what for each in collect(other) if "checkpoints" in each.what] == [
            f"checkpoints train/{stored.recipe.key}"
        ]
        assert collect(other, older=timedelta(days=1)) == []
        assert next(running) == "train"
        assert [each.what for each in sweep(experiment, other)] == [f"checkpoints train/{stored.recipe.key}"]
        assert stored.complete() == []


def test_checkpoints_are_listed_and_verified(
    settings: dict[str, Any], stages: Stages, tmp_path: Path
) -> None:
    experiment = changed(settings)
    running = stages(experiment)
    while next(running) != "assemble training set":
        pass
    stored = checkpointed(experiment, 1, tmp_path)
    workspace = Workspace(experiment)
    (line,) = [each for each in listing(workspace, False).lines if each.step == "checkpoints"]
    assert (line.key, line.objects, line.used) == (stored.recipe.key, 3, "now")
    assert verify(workspace).damaged == ()
    key = f"{stored.complete()[0].folder}/state"
    stored.objects.write(key, b"2")
    found = verify(workspace, repair=True)
    assert [each.key for each in found.damaged] == [key]
    assert found.quarantined == ()
