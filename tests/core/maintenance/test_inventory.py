"""`qrpo ls`, `verify`, `compact`: what a store holds, and whether it is whole."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.formatting import size
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.compact import compact, compaction_lines
from qrpo_core.maintenance.in_use import known_steps
from qrpo_core.maintenance.listing import listing, listing_lines
from qrpo_core.maintenance.verify import verified_lines, verify
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute
from tests.core.stores import REWARD, collect, files, flip, planned, sweep

# ls


def test_ls_counts_what_is_there(settings: dict[str, Any], other: Experiment) -> None:
    steps, _ = precompute(changed(settings))
    experiment = steps.workspace.experiment
    found = listing(steps.workspace, everything=False)
    rows = len(steps.first.rewards.completions.wanted) * 3
    by_step = {line.step: line for line in found.lines}
    assert {step: line.rows for step, line in by_step.items()} == {
        "prompts": 12,
        "quantiles": rows,
        "training_set": rows,
        "sample": rows,
        "reward": rows,
        "logprob": rows,
    }
    assert {line.used for line in found.lines} == {"now"}
    assert by_step["sample"].blocks == -(-rows // 5)
    there = files(experiment)
    assert (found.objects, found.bytes) == (len(there), sum(there.values()))
    assert sum(line.bytes for line in found.lines) == found.bytes
    assert found.others == (0, 0, 0)
    precompute(other)
    again = listing(Workspace(experiment), everything=False)
    assert again.lines == found.lines
    assert again.others == (3, len(files(experiment)) - len(there), again.bytes - found.bytes)
    whole = listing(Workspace(experiment), everything=True)
    assert [line for line in whole.lines if line.used] == list(found.lines)
    assert {line.step for line in whole.lines if not line.used} == {"reward", "quantiles", "training_set"}
    text = "\n".join(listing_lines(again))
    assert "Not used by it: 3 recipes" in text
    assert by_step["sample"].key in text


def test_ls_of_an_empty_store(settings: dict[str, Any]) -> None:
    text = "\n".join(listing_lines(listing(Workspace(changed(settings)), everything=False)))
    assert "Nothing of this experiment." in text
    assert "In all: 0 objects, 0 B" in text


def test_what_another_budget_has_made_is_kept(settings: dict[str, Any]) -> None:
    precompute(changed(settings, sampling={"references_per_prompt": 5}))
    small = changed(settings, sampling={"references_per_prompt": 2})
    used = {line.step: line.used for line in listing(Workspace(small), everything=True).lines}
    assert used == {
        "prompts": "now",
        "quantiles": "kept",
        "training_set": "kept",
        "sample": "now",
        "reward": "now",
        "logprob": "now",
    }
    assert collect(small) == []


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 999_999, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "1 MB",
        "5 TB",
    ]


# verify


def test_verify_finds_damage_and_repair_makes_only_that_again(settings: dict[str, Any]) -> None:
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    seen: list[tuple[int, int]] = []
    whole = verify(Workspace(experiment), progress=lambda objects, amount: seen.append((objects, amount)))
    assert (whole.scope, whole.damaged) == ("used", ())
    assert seen[-1] == (whole.objects, whole.bytes)
    assert whole.objects == sum(name.endswith(".parquet") for name in files(experiment))
    before = planned(experiment)
    samples = steps.first.row_steps[0]
    first, second = steps.workspace.blocks.committed(samples.recipe)[:2]
    root = Path(experiment.store.path)
    flip(root / first.file)
    (root / second.file).unlink()
    quantiles = steps.workspace.artifacts.get(steps.first.quantiles_recipe)
    flip(root / quantiles.path("pairs.parquet"))
    (root / quantiles.path("rank_counts.parquet")).unlink()
    found = verify(Workspace(experiment))
    assert {check.key: check.rows for check in found.damaged} == {
        first.manifest_key: first.rows,
        second.manifest_key: second.rows,
        quantiles.path("pairs.parquet"): 0,
        quantiles.path("rank_counts.parquet"): 0,
    }
    text = "\n".join(verified_lines(found, "here"))
    row_range = next(iter(first.ranges))
    assert f"{first.rows} rows: {row_range.key}:{row_range.first}-" in text
    assert "content and digest differ" in text
    assert "4 damaged" in text
    repaired = verify(Workspace(experiment), repair=True)
    assert repaired.damaged == found.damaged
    assert len(repaired.quarantined) == 3
    missing = {stage: lost for stage, _, lost in planned(experiment) if lost}
    expected = {stage: lost for stage, _, lost in before if lost}
    assert missing == expected | {"sample references": first.rows + second.rows, "compute quantiles": 1}
    quarantined = listing(Workspace(experiment), everything=False).quarantined
    assert (
        sorted((each.step, each.rows) for each in quarantined)
        == [
            ("quantiles", 0),
            ("sample", second.rows),
            ("sample", first.rows),
        ]
        or len(quarantined) == 3
    )
    _, computed = precompute(experiment)
    assert computed["sample references"] == first.rows + second.rows
    assert computed["annotate references"] == 0
    assert verify(Workspace(experiment)).damaged == ()
    assert planned(experiment) == before


def test_unreadable_manifests_are_found_and_repaired(settings: dict[str, Any], other: Experiment) -> None:
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    before = planned(experiment)
    root = Path(experiment.store.path)
    block = steps.workspace.blocks.committed(steps.first.row_steps[0].recipe)[0]
    (root / block.manifest_key).write_text("{")
    (root / steps.workspace.artifacts.get(steps.first.training_set_recipe).manifest_key).write_text(
        "not json"
    )
    found = verify(Workspace(experiment), repair=True)
    assert found.scope == "all"  # with a manifest unreadable, nobody knows what is used
    assert {check.key for check in found.damaged} == {
        block.manifest_key,
        f"{steps.first.training_set_recipe.path}/manifest.json",
    }
    assert verify(Workspace(experiment)).damaged == ()
    missing = {stage: lost for stage, _, lost in planned(experiment) if lost}
    assert missing == {stage: lost for stage, _, lost in before if lost} | {
        "sample references": block.rows,
        "assemble training set": 1,
    }


def test_damaged_prompts_are_found_although_they_name_the_rest(settings: dict[str, Any]) -> None:
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    made = steps.workspace.artifacts.get(steps.prompts_recipe)
    flip(Path(experiment.store.path) / made.path("prompts.parquet"))
    found = verify(Workspace(experiment), repair=True)
    assert found.scope == "all"
    assert [check.key for check in found.damaged] == [made.path("prompts.parquet")]
    assert verify(Workspace(experiment)).damaged == ()


def test_verify_looks_at_what_the_experiment_uses_or_at_all(
    settings: dict[str, Any], other: Experiment
) -> None:
    experiment = changed(settings)
    precompute(experiment)
    steps, _ = precompute(other)
    block = steps.workspace.blocks.committed(steps.first.rewards.recipe)[0]
    flip(Path(experiment.store.path) / block.file)
    assert verify(Workspace(experiment)).damaged == ()
    assert [check.key for check in verify(Workspace(experiment), everything=True).damaged] == [
        block.manifest_key
    ]
    assert [check.key for check in verify(Workspace(other)).damaged] == [block.manifest_key]


def test_blocks_whose_recipe_is_gone_are_reported_and_not_deleted(
    settings: dict[str, Any], other: Experiment
) -> None:
    experiment = changed(settings)
    precompute(experiment)
    steps, _ = precompute(other)
    recipe = f"{steps.first.rewards.recipe.blocks_path}/recipe.json"
    (Path(experiment.store.path) / recipe).unlink()
    assert [check.key for check in verify(Workspace(other), repair=True).damaged] == [recipe]
    assert verify(Workspace(experiment)).damaged == ()
    sweep(experiment)
    assert sum(name.startswith(recipe.removesuffix("recipe.json")) for name in files(experiment)) > 1


# compact


def test_compact_merges_the_experiments_blocks_and_no_others(
    settings: dict[str, Any], other: Experiment
) -> None:
    settings = settings | {"store": settings["store"] | {"rows_per_block": 5}}
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    precompute(other)
    before = planned(experiment)
    rows = steps.first.rewards.read()
    untouched = {
        name for name in files(experiment) if known_steps(Workspace(other)).first.rewards.recipe.key in name
    }
    large = changed(settings, store={"rows_per_block": 1000})
    done = list(compact(Workspace(large)))
    assert {recipe.step: (made.before > 1, made.after) for recipe, made in done} == {
        "sample": (True, 1),
        "reward": (True, 1),
        "logprob": (True, 1),
    }
    assert planned(experiment) == before
    assert known_steps(Workspace(experiment)).first.rewards.read().equals(rows)
    assert untouched <= files(experiment).keys()
    assert collect(experiment, other) == []
    text = "\n".join(compaction_lines(done, "here"))
    assert "3 after" in text
    assert compaction_lines([], "here")[-1] == "No blocks of this experiment yet."


@pytest.mark.slow
def test_the_same_on_s3(settings: dict[str, Any], s3_store: StoreConfig) -> None:
    settings = settings | {"store": s3_store.model_dump(mode="json") | {"rows_per_block": 5}}
    experiment = changed(settings)
    steps, _ = precompute(experiment)
    before = planned(experiment)
    small = listing(Workspace(experiment), everything=False)
    precompute(parse_experiment({**settings, "reward": REWARD}))
    steps.workspace.objects.write("probe/0123", b"left")
    assert collect(experiment, older=timedelta(days=7)) == []
    assert {each.what for each in sweep(experiment)} > {"probe/"}
    assert listing(Workspace(experiment), everything=True) == small
    assert planned(experiment) == before
    assert verify(Workspace(experiment), everything=True).damaged == ()
    block = steps.workspace.blocks.committed(steps.first.rewards.recipe)[0]
    steps.workspace.objects.delete(block.file)
    assert [check.rows for check in verify(Workspace(experiment), repair=True).damaged] == [block.rows]
    _, computed = precompute(experiment)
    assert computed["annotate references"] == block.rows
    assert all(
        made.after == 1 for _, made in compact(Workspace(changed(settings, store={"rows_per_block": 99})))
    )
    assert planned(experiment) == before
