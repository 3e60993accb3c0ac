"""`qrpo gc`: nothing that a following run needs is ever lost, and nothing else stays."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, MissingError
from qrpo_core.experiments import parse_experiment
from qrpo_core.inventory.check import verify
from qrpo_core.inventory.garbage import delete, garbage_lines, left_lines
from qrpo_core.inventory.listing import listing
from qrpo_core.inventory.uses import known_chain, policy_of, stored_recipes, uses
from qrpo_core.steps import budgets, policies, prompts
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.workspace import Workspace
from tests.core.stores import REWARD, Cut, Cutting, collect, files, fill, flip, planned, sweep


def test_gc_in_the_middle_of_things_takes_nothing_away(
    steps: Any, settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    for stage in stages(experiment):
        before, there = planned(experiment), files(experiment)
        assert sweep(experiment) == [], stage
        assert (planned(experiment), files(experiment)) == (before, there)
    unmade = ("check rows", "evaluate", "report")  # by the stages of this test
    assert not any(missing for stage, _, missing in planned(experiment) if stage not in unmade)
    # With fewer rounds or another budget the later rounds are not asked for, and are the experiment's still.
    for less in ({"rounds": {"count": 1}}, {"sampling": {"references_per_prompt": 2}}):
        assert sweep(steps.changed(settings, **less)) == []


def test_gc_finds_what_another_experiment_left(
    steps: Any, settings: dict[str, Any], other: Experiment, stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings)
    list(stages(experiment))
    before, there = planned(experiment), files(experiment)
    list(stages(other))
    elsewhere = steps.changed(settings, sampling={"temperature": 0.5})
    steps.precompute(elsewhere)
    assert collect(experiment, other, elsewhere) == []
    found = sweep(experiment, other)
    assert {each.what.split()[1].split("/")[0] for each in found} == {
        "sample",
        "reward",
        "logprob",
        "quantiles",
        "training_set",
    }
    assert collect(experiment, other) == []
    second = planned(other)
    found = sweep(experiment)
    assert {each.what.split()[1].split("/")[0] for each in found} == {
        "sample",  # drawn from the other's policy
        "reward",
        "logprob",
        "quantiles",
        "training_set",
        "train",
    }
    assert planned(experiment) == before
    assert files(experiment) == there
    present = {stage: there for stage, there, _ in planned(other)}
    shared = {stage: there for stage, there, _ in second}
    assert present["sample references"] == shared["sample references"] > 0
    assert present["score references"] == 0
    assert verify(Workspace(experiment), everything=True).damaged == ()


def test_gc_keeps_what_is_young_and_what_that_was_made_from(
    steps: Any, settings: dict[str, Any], other: Experiment
) -> None:
    experiment = steps.changed(settings)
    elsewhere = steps.changed(settings, sampling={"temperature": 0.5})
    chain, _ = steps.precompute(elsewhere)
    prompts.build(Workspace(experiment), prompts.recipe(Workspace(experiment)))
    week = timedelta(days=7)
    assert collect(experiment, older=week) == []
    old = time.time() - 8 * 86400
    root = Path(experiment.store.path)
    young = root / chain.workspace.artifacts.get(chain.first.training_set).index
    for path in root.rglob("*"):
        if path.is_file() and path != young:
            os.utime(path, (old, old))
    assert collect(experiment, older=week) == []  # all of it is what the training set was made from
    os.utime(young, (old, old))
    assert {each.what.split()[1].split("/")[0] for each in collect(experiment, older=week)} == {
        "sample",
        "reward",
        "logprob",
        "quantiles",
        "training_set",
    }
    assert collect(elsewhere, older=week) == []


def test_gc_takes_what_no_manifest_names(steps: Any, settings: dict[str, Any]) -> None:
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    there = files(experiment)
    samples = chain.first.row_steps[0].recipe
    left = [
        f"{samples.blocks_path}/rows/0123.parquet",
        f"{chain.first.quantiles.path}/0123456789abcdef/pairs.parquet",
        f"{chain.first.train.path}/0123456789abcdef/policy/config.json",
        "tmp/0123",
        "probe/0123",
    ]
    for key in left:
        chain.workspace.objects.write(key, b"left")
    chain.workspace.objects.write(f"{chain.first.quantiles.path}/_prefect.json", b"{}")
    chain.workspace.objects.write("notes/by-somebody.txt", b"not ours")
    assert collect(experiment, older=timedelta(days=7)) == []
    found = sweep(experiment)
    assert sorted(entry.key for each in found for entry in each.entries) == sorted(left)
    kept = {f"{chain.first.quantiles.path}/_prefect.json": 2, "notes/by-somebody.txt": 8}
    assert files(experiment) == there | kept
    text = "\n".join(garbage_lines(found, "here", days=0))
    assert "no manifest names it" in text
    assert "To delete: 5 objects, 20 B." in text
    assert left_lines(found, found[:1])[0].startswith("Left alone")


def test_gc_of_set_aside_blocks_and_budgets(steps: Any, settings: dict[str, Any], other: Experiment) -> None:
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    workspace = chain.workspace
    block = workspace.blocks.committed(chain.first.row_steps[0].recipe)[0]
    aside = workspace.blocks.set_aside(block, "for the test")
    samples, rewards = reference_steps(workspace)
    budgets.write(workspace.objects, samples.recipe, rewards.recipe, {"p": 9})
    kept = budgets.location(samples.recipe, rewards.recipe)
    budgets.write(workspace.objects, rewards.recipe, samples.recipe, {"p": 9})
    stray = f"budgets/{'0' * 32}/{'1' * 32}.json"
    workspace.objects.write(stray, b"{}")
    before = planned(experiment)
    found = sweep(experiment)
    assert sorted(entry.key for each in found for entry in each.entries) == sorted([aside, block.file, stray])
    assert kept in files(experiment)
    assert planned(experiment) == before


def test_gc_keeps_what_a_set_aside_policy_drew(
    steps: Any, settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    list(stages(experiment))
    chain = known_chain(Workspace(experiment))
    trained = chain.workspace.artifacts.get(chain.first.train)
    drawn = files(experiment)
    weights = trained.path("policy/model.safetensors")
    flip(Path(experiment.store.path) / weights)
    assert [check.key for check in verify(Workspace(experiment), repair=True).damaged] == [weights]
    deleted = {entry.key for each in sweep(experiment) for entry in each.entries}
    lost = {key for key in deleted if not key.startswith((f"{chain.first.train.path}/", "aside/"))}
    assert lost == set()
    assert {key for key in drawn if key.startswith("blocks/")} <= files(experiment).keys()


def test_gc_refuses_to_judge_what_an_unreadable_policy_drew(
    steps: Any, settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    list(stages(experiment))
    chain = known_chain(Workspace(experiment))
    trained = chain.workspace.artifacts.get(chain.first.train)
    file = Path(experiment.store.path) / trained.index
    whole = file.read_bytes()
    file.write_text("{}")
    assert [check.key for check in verify(Workspace(experiment), repair=True).damaged] == [trained.index]
    with pytest.raises(MissingError, match="set aside unreadable, so what was drawn from it"):
        collect(experiment)
    file.write_bytes(whole)  # made again
    assert {entry.key for each in collect(experiment) for entry in each.entries} == {
        f"aside/train/{trained.key}/manifest.json"
    }


def test_gc_refuses_to_judge_samples_of_a_model_that_has_no_name_yet(
    steps: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF tokenizer.chat_template")  # as much of one as its name needs
    unconverted = steps.changed(settings, model={"path": str(file)})
    assert collect(unconverted) == []
    steps.precompute(steps.changed(settings))
    with pytest.raises(MissingError, match="is not converted, so its samples cannot be told"):
        collect(unconverted)


def test_gc_of_two_stores_is_refused(steps: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several stores"):
        collect(steps.changed(settings), steps.changed(settings, store={"path": str(tmp_path / "second")}))


def test_gc_leaves_alone_what_is_written_to_meanwhile(
    steps: Any, settings: dict[str, Any], other: Experiment
) -> None:
    experiment = steps.changed(settings)
    steps.precompute(experiment)
    chain, _ = steps.precompute(other)
    found = collect(experiment)
    more = parse_experiment(
        {**settings, "reward": REWARD, "sampling": {**settings["sampling"], "references_per_prompt": 4}}
    )
    _, computed = steps.precompute(more)  # another run tops the same rewards up
    assert computed["score references"] > 0
    left = delete(Workspace(experiment).objects, found)
    assert [each.what for each in left] == [f"blocks reward/{chain.first.rewards.recipe.key}"]
    assert verify(Workspace(experiment), everything=True).damaged == ()


def test_policies_are_named_from_their_manifests(
    steps: Any, settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings)
    list(stages(experiment))
    chain = known_chain(Workspace(experiment))
    made = chain.workspace.artifacts.get(chain.first.train)
    assert policy_of(made) == policies.stored(chain.workspace, made).digest
    assert policy_of(chain.workspace.artifacts.get(chain.first.quantiles)) is None


def test_a_crash_while_deleting_leaves_no_manifest_without_data(
    steps: Any, settings: dict[str, Any], other: Experiment, tmp_path: Path
) -> None:
    experiment = steps.changed(settings)
    steps.precompute(experiment)
    steps.precompute(other)
    total = sum(len(each.entries) for each in collect(experiment))
    assert total > 10
    for after in range(0, total, 3):
        copy = tmp_path / f"copy{after}"
        shutil.copytree(experiment.store.path, copy)
        there = steps.changed(settings, store={"path": str(copy)})
        with pytest.raises(Cut):
            delete(Cutting(Workspace(there), after), collect(there))  # type: ignore[arg-type]
        assert verify(Workspace(there), everything=True).damaged == (), after
        sweep(there)
        assert collect(there) == []


VARIANTS = [
    {"sampling": {"references_per_prompt": budget, "temperature": heat}, "reward": reward}
    for budget in (2, 3)
    for heat in (1.0, 0.5)
    for reward in (REWARD, {"kind": "number"})
]


@hypothesis_settings(max_examples=10)
@given(data=st.data())
def test_gc_laws(tiny_model: Path, data: st.DataObject) -> None:
    """Whatever was run in whatever order: the named lose nothing, the rest goes, a crash harms nobody."""
    ran = data.draw(st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=4), label="ran")
    named = data.draw(st.lists(st.sampled_from(VARIANTS), min_size=1, max_size=3), label="named")
    after = data.draw(st.integers(0, 40), label="deletions before a crash")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "questions.jsonl"
        source.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": n}) + "\n" for n in range(6)))
        experiments = [_variant(folder, tiny_model, each) for each in (*ran, *named)]
        ran_, named_ = experiments[: len(ran)], experiments[len(ran) :]
        for each in ran_:
            _draw_and_rank(Workspace(each))
        before = [planned(each) for each in named_]
        found = collect(*named_)
        try:
            delete(Cutting(Workspace(named_[0]), after), found)  # type: ignore[arg-type]
        except Cut:
            assert verify(Workspace(named_[0]), everything=True).damaged == ()
            sweep(*named_)
        assert [planned(each) for each in named_] == before
        assert collect(*named_) == []
        kept = set().union(*(uses(Workspace(each), stored_recipes(Workspace(each))).kept for each in named_))
        assert {line.key for line in listing(Workspace(named_[0]), everything=True).lines} <= kept
        assert verify(Workspace(named_[0]), everything=True).damaged == ()


def _variant(folder: str, model: Path, sections: dict[str, Any]) -> Experiment:
    return parse_experiment(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "prompts": {
                "kind": "file",
                "path": f"{folder}/questions.jsonl",
                "reference_field": "answer",
                "held_out": 0.3,
            },
            "sampling": {"engine": "fake", "max_new_tokens": 8, **sections["sampling"]},
            "reward": sections["reward"],
            "store": {"path": f"{folder}/store"},
        }
    )


def _draw_and_rank(workspace: Workspace) -> None:
    prompts.build(workspace, prompts.recipe(workspace))
    round_ = known_chain(workspace).first
    for step in round_.row_steps:
        fill(workspace, step)
    round_.build_quantiles()
