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

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.gc import Found, delete, garbage_lines, left_lines
from qrpo_core.maintenance.in_use import known_steps, stored_recipes, used_recipes
from qrpo_core.maintenance.listing import listing
from qrpo_core.maintenance.verify import verify
from qrpo_core.models.source import policy_digest
from qrpo_core.pipeline import budgets, policies, prompts
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute
from tests.core.stores import REWARD, Cut, Cutting, collect, files, fill, flip, planned, sweep


def test_gc_in_the_middle_of_things_takes_nothing_away(
    settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    for stage in stages(experiment):
        before, there = planned(experiment), files(experiment)
        assert sweep(experiment) == [], stage
        assert (planned(experiment), files(experiment)) == (before, there)
    unmade = ("check rows", "evaluate policy", "write report")  # by the stages of this test
    assert not any(missing for stage, _, missing in planned(experiment) if stage not in unmade)
    # With fewer rounds or another budget the later rounds are not asked for, and are the experiment's still.
    for less in ({"rounds": {"count": 1}}, {"sampling": {"references_per_prompt": 2}}):
        assert sweep(changed(settings, **less)) == []


def test_gc_finds_what_another_experiment_left(
    settings: dict[str, Any], other: Experiment, stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = changed(settings)
    list(stages(experiment))
    before, there = planned(experiment), files(experiment)
    list(stages(other))
    elsewhere = changed(settings, sampling={"temperature": 0.5})
    precompute(elsewhere)
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
        "training_set",  # and not its policy
    }
    assert planned(experiment) == before
    more = set(files(experiment)) - set(there)
    assert {name.rsplit("/", name.count("/") - 1)[0] for name in more} == {"artifacts/train"}
    present = {stage: there for stage, there, _ in planned(other)}
    shared = {stage: there for stage, there, _ in second}
    assert present["sample references"] == shared["sample references"] > 0
    assert present["annotate references"] == 0
    assert verify(Workspace(experiment), everything=True).damaged == ()


def test_gc_keeps_what_is_young_and_what_that_was_made_from(
    settings: dict[str, Any], other: Experiment
) -> None:
    experiment = changed(settings)
    elsewhere = changed(settings, sampling={"temperature": 0.5})
    steps, _ = precompute(elsewhere)
    prompts.build(Workspace(experiment), prompts.recipe(Workspace(experiment)))
    week = timedelta(days=7)
    assert collect(experiment, older=week) == []
    old = time.time() - 8 * 86400
    root = Path(experiment.store.path)
    young = root / steps.workspace.artifacts.get(steps.first.training_set_recipe).manifest_key
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


def test_gc_takes_what_no_manifest_names(settings: dict[str, Any]) -> None:
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    there = files(experiment)
    samples = steps.first.row_steps[0].recipe
    left = [
        f"{samples.blocks_path}/rows/0123.parquet",
        f"{steps.first.quantiles_recipe.path}/0123456789abcdef/pairs.parquet",
        f"{steps.first.train_recipe.path}/0123456789abcdef/policy/config.json",
        "tmp/0123",
        "probe/0123",
    ]
    for key in left:
        steps.workspace.objects.write(key, b"left")
    steps.workspace.objects.write(f"{steps.first.quantiles_recipe.path}/_prefect.json", b"{}")
    steps.workspace.objects.write("notes/by-somebody.txt", b"not ours")
    assert collect(experiment, older=timedelta(days=7)) == []
    found = sweep(experiment)
    assert sorted(entry.key for each in found for entry in each.entries) == sorted(left)
    kept = {f"{steps.first.quantiles_recipe.path}/_prefect.json": 2, "notes/by-somebody.txt": 8}
    assert files(experiment) == there | kept
    text = "\n".join(garbage_lines(Found(found, []), "here", days=0))
    assert "no manifest names it" in text
    assert "To delete: 5 objects, 20 B." in text
    assert left_lines(found, found[:1])[0].startswith("Kept, because")


def test_gc_of_quarantine_and_budgets(settings: dict[str, Any], other: Experiment) -> None:
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    workspace = steps.workspace
    block = workspace.blocks.committed(steps.first.row_steps[0].recipe)[0]
    quarantined = workspace.blocks.quarantine(block, "for the test")
    samples, rewards = reference_steps(workspace)
    budgets.write(workspace.objects, samples.recipe, rewards.recipe, {"p": 9})
    kept = budgets.location(samples.recipe, rewards.recipe)
    budgets.write(workspace.objects, rewards.recipe, samples.recipe, {"p": 9})
    stray = f"budgets/{'0' * 32}/{'1' * 32}.json"
    workspace.objects.write(stray, b"{}")
    before = planned(experiment)
    found = sweep(experiment)
    assert sorted(entry.key for each in found for entry in each.entries) == sorted(
        [quarantined, block.file, stray]
    )
    assert kept in files(experiment)
    assert planned(experiment) == before


def two_rounds(settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]) -> Any:
    """An experiment of two rounds in the store, its steps, and the artifact of the first round's policy."""
    experiment = changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    list(stages(experiment))
    steps = known_steps(Workspace(experiment))
    trained = steps.workspace.artifacts.get(steps.first.train_recipe)
    return experiment, steps, trained


def test_gc_keeps_what_a_quarantined_policy_drew(
    settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment, steps, trained = two_rounds(settings, stages)
    drawn = files(experiment)
    weights = trained.path("policy/model.safetensors")
    flip(Path(experiment.store.path) / weights)
    assert [check.key for check in verify(Workspace(experiment), repair=True).damaged] == [weights]
    deleted = {entry.key for each in sweep(experiment) for entry in each.entries}
    lost = {
        key for key in deleted if not key.startswith((f"{steps.first.train_recipe.path}/", "quarantine/"))
    }
    assert lost == set()
    assert {key for key in drawn if key.startswith("blocks/")} <= files(experiment).keys()


def test_gc_refuses_to_judge_what_an_unreadable_policy_drew(
    settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment, _, trained = two_rounds(settings, stages)
    file = Path(experiment.store.path) / trained.manifest_key
    whole = file.read_bytes()
    file.write_text("{}")
    assert [check.key for check in verify(Workspace(experiment), repair=True).damaged] == [
        trained.manifest_key
    ]
    with pytest.raises(MissingError, match="quarantined unreadable, so the samples drawn from it"):
        collect(experiment)
    file.write_bytes(whole)  # made again
    assert {entry.key for each in collect(experiment) for entry in each.entries} == {
        f"quarantine/train/{trained.key}/manifest.json"
    }


def test_gc_refuses_to_judge_samples_of_a_model_that_has_no_name_yet(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF tokenizer.chat_template")  # as much of one as its name needs
    unconverted = changed(settings, model={"path": str(file)})
    assert collect(unconverted) == []
    precompute(changed(settings))
    with pytest.raises(MissingError, match="is not converted, so its samples are unknown"):
        collect(unconverted)


def test_gc_of_two_stores_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several stores"):
        collect(changed(settings), changed(settings, store={"path": str(tmp_path / "second")}))


def test_gc_leaves_alone_what_is_written_to_meanwhile(settings: dict[str, Any], other: Experiment) -> None:
    experiment = changed(settings)
    precompute(experiment)
    steps, _ = precompute(other)
    found = collect(experiment)
    more = parse_experiment(
        {**settings, "reward": REWARD, "sampling": {**settings["sampling"], "references_per_prompt": 4}}
    )
    _, computed = precompute(more)  # another run tops the same rewards up
    assert computed["annotate references"] > 0
    left = delete(Workspace(experiment).objects, found)
    assert [each.what for each in left] == [f"blocks reward/{steps.first.rewards.recipe.key}"]
    assert verify(Workspace(experiment), everything=True).damaged == ()


def test_policies_are_named_from_their_manifests(
    settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = changed(settings)
    list(stages(experiment))
    steps = known_steps(Workspace(experiment))
    made = steps.workspace.artifacts.get(steps.first.train_recipe)
    stored = policies.stored(steps.workspace, made)
    assert policies.digest_of(made.files) == stored.digest == policy_digest(stored.directory)
    assert policies.digest_of(steps.workspace.artifacts.get(steps.first.quantiles_recipe).files) is None


def test_a_crash_while_deleting_leaves_no_manifest_without_data(
    settings: dict[str, Any], other: Experiment, tmp_path: Path
) -> None:
    experiment = changed(settings)
    precompute(experiment)
    precompute(other)
    total = sum(len(each.entries) for each in collect(experiment))
    assert total > 10
    for after in range(0, total, 3):
        copy = tmp_path / f"copy{after}"
        shutil.copytree(experiment.store.path, copy)
        there = changed(settings, store={"path": str(copy)})
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


@hypothesis_settings(max_examples=hypothesis_settings.default.max_examples // 5)
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
        kept = set().union(
            *(used_recipes(Workspace(each), stored_recipes(Workspace(each))).kept for each in named_)
        )
        assert {line.key for line in listing(Workspace(named_[0]), everything=True).lines} <= kept
        assert verify(Workspace(named_[0]), everything=True).damaged == ()


def _variant(folder: str, model: Path, sections: dict[str, Any]) -> Experiment:
    return parse_experiment(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "prompts": {
                "kind": "file",
                "path": f"{folder}/questions.jsonl",
                "ground_truth_field": "answer",
                "held_out": 0.3,
            },
            "sampling": {"engine": "fake", "max_new_tokens": 8, **sections["sampling"]},
            "reward": sections["reward"],
            "store": {"path": f"{folder}/store"},
        }
    )


def _draw_and_rank(workspace: Workspace) -> None:
    prompts.build(workspace, prompts.recipe(workspace))
    round_ = known_steps(workspace).first
    for step in round_.row_steps:
        fill(workspace, step)
    round_.build_quantiles()
