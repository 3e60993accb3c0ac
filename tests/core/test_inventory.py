"""`qrpo ls`, `verify`, `gc`, `compact`: nothing that a following run needs is ever lost."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qrpo_core.config import Experiment
from qrpo_core.errors import ConfigError, MissingError
from qrpo_core.experiments import parse_experiment
from qrpo_core.inventory.check import verified_lines, verify
from qrpo_core.inventory.compaction import compact, compaction_lines
from qrpo_core.inventory.garbage import Garbage, delete, garbage, garbage_lines, left_lines
from qrpo_core.inventory.listing import listing, listing_lines
from qrpo_core.inventory.text import size
from qrpo_core.inventory.uses import known_chain, policy_of, stored_recipes, uses
from qrpo_core.plan import plan
from qrpo_core.steps import budgets, policies, prompts
from qrpo_core.steps.chain import reference_steps
from qrpo_core.steps.policies import folder_files
from qrpo_core.steps.workspace import Workspace

NOW = timedelta(seconds=-1)  # older than this: everything
REWARD = {"kind": "length", "min_words": 4, "max_words": 8}


def fill(workspace: Workspace, step: Any) -> None:
    for each in workspace.blocks.plan(step.recipe, step.wanted, 5):
        table, facts = step.compute(each, lambda count: None)
        workspace.blocks.commit(each, table, step.schema, 1.0, **facts)


def planned(experiment: Experiment) -> list[tuple[str, int, int]]:
    return [(each.stage, each.present, each.missing) for each in plan(Workspace(experiment))]


def collect(*experiments: Experiment, older: timedelta = NOW) -> list[Garbage]:
    return garbage([Workspace(each) for each in experiments], datetime.now(UTC) - older)


def sweep(*experiments: Experiment, older: timedelta = NOW) -> list[Garbage]:
    """Delete what `collect` finds."""
    found = collect(*experiments, older=older)
    assert delete(Workspace(experiments[0]).objects, found) == []
    return found


def files(experiment: Experiment) -> dict[str, int]:
    root = Path(experiment.store.path)
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in root.rglob("*") if p.is_file()}


def flip(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def other(settings: dict[str, Any], steps: Any) -> Experiment:
    """The same samples by another reward."""
    return parse_experiment({**settings, "reward": REWARD})


@pytest.fixture
def stages(steps: Any, make_tiny_model: Any, tmp_path: Path) -> Callable[[Experiment], Iterator[str]]:
    """Everything of an experiment but the evaluation, stage by stage; policies are made, not trained."""

    def run(experiment: Experiment) -> Iterator[str]:
        workspace = Workspace(experiment)
        prompts.build(workspace, prompts.recipe(workspace))
        yield "prompts"
        chain = known_chain(workspace)
        for number in range(1, experiment.rounds.count + 1):
            round_ = chain.round(number)
            for step in round_.row_steps:
                fill(workspace, step)
                yield step.label
            round_.build_quantiles()
            yield "quantiles"
            fill(workspace, round_.logprobs)
            round_.build_training_set()
            yield "training set"
            model = make_tiny_model(Path(tempfile.mkdtemp(dir=tmp_path)) / "policy")
            (model / "merges.txt").write_text(f"{round_.train.key}")  # not read; another policy each
            workspace.artifacts.commit(round_.train, folder_files(model), {"rows": 1, "steps": 1}, 0.0)
            yield "train"
        end = chain.after(chain.last())
        for step in (*chain.before, *end.after, *end.divergence):
            fill(workspace, step)
        yield "evaluation's rows"

    return run


# ls


def test_ls_counts_what_is_there(steps: Any, settings: dict[str, Any], other: Experiment) -> None:
    chain, _ = steps.precompute(steps.changed(settings))
    experiment = chain.workspace.experiment
    found = listing(chain.workspace, everything=False)
    rows = len(chain.first.rewards.completions.wanted) * 3
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
    steps.precompute(other)
    again = listing(Workspace(experiment), everything=False)
    assert again.lines == found.lines
    assert again.others == (3, len(files(experiment)) - len(there), again.bytes - found.bytes)
    whole = listing(Workspace(experiment), everything=True)
    assert [line for line in whole.lines if line.used] == list(found.lines)
    assert {line.step for line in whole.lines if not line.used} == {"reward", "quantiles", "training_set"}
    text = "\n".join(listing_lines(again))
    assert "Not used by it: 3 recipes" in text
    assert by_step["sample"].key in text


def test_ls_of_an_empty_store(steps: Any, settings: dict[str, Any]) -> None:
    text = "\n".join(listing_lines(listing(Workspace(steps.changed(settings)), everything=False)))
    assert "Nothing of this experiment." in text
    assert "In all: 0 objects, 0 B" in text


def test_what_another_budget_has_made_is_kept(steps: Any, settings: dict[str, Any]) -> None:
    steps.precompute(steps.changed(settings, sampling={"references_per_prompt": 5}))
    small = steps.changed(settings, sampling={"references_per_prompt": 2})
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


def test_verify_finds_damage_and_repair_makes_only_that_again(steps: Any, settings: dict[str, Any]) -> None:
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    seen: list[tuple[int, int]] = []
    whole = verify(Workspace(experiment), progress=lambda objects, amount: seen.append((objects, amount)))
    assert (whole.scope, whole.damaged) == ("used", ())
    assert seen[-1] == (whole.objects, whole.bytes)
    assert whole.objects == sum(name.endswith(".parquet") for name in files(experiment))
    before = planned(experiment)
    samples = chain.first.row_steps[0]
    first, second = chain.workspace.blocks.committed(samples.recipe)[:2]
    root = Path(experiment.store.path)
    flip(root / first.file)
    (root / second.file).unlink()
    quantiles = chain.workspace.artifacts.get(chain.first.quantiles)
    flip(root / quantiles.path("pairs.parquet"))
    (root / quantiles.path("rank_counts.parquet")).unlink()
    found = verify(Workspace(experiment))
    assert {check.key: check.rows for check in found.damaged} == {
        first.index: first.rows,
        second.index: second.rows,
        quantiles.path("pairs.parquet"): 0,
        quantiles.path("rank_counts.parquet"): 0,
    }
    text = "\n".join(verified_lines(found, "here"))
    run = next(iter(first.runs))
    assert f"{run.key}:{run.first}-" in text
    assert "content and digest differ" in text
    assert "4 damaged" in text
    repaired = verify(Workspace(experiment), repair=True)
    assert repaired.damaged == found.damaged
    assert len(repaired.aside) == 3
    missing = {stage: lost for stage, _, lost in planned(experiment) if lost}
    expected = {stage: lost for stage, _, lost in before if lost}
    assert missing == expected | {"sample references": first.rows + second.rows, "quantiles": 1}
    aside = listing(Workspace(experiment), everything=False).aside
    assert sorted((each.step, each.rows) for each in aside) == [
        ("quantiles", 0),
        ("sample", second.rows),
        ("sample", first.rows),
    ] or len(aside) == 3
    _, computed = steps.precompute(experiment)
    assert computed["sample references"] == first.rows + second.rows
    assert computed["score references"] == 0
    assert verify(Workspace(experiment)).damaged == ()
    assert planned(experiment) == before


def test_unreadable_manifests_are_found_and_repaired(
    steps: Any, settings: dict[str, Any], other: Experiment
) -> None:
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    before = planned(experiment)
    root = Path(experiment.store.path)
    block = chain.workspace.blocks.committed(chain.first.row_steps[0].recipe)[0]
    (root / block.index).write_text("{")
    (root / chain.workspace.artifacts.get(chain.first.training_set).index).write_text("not json")
    found = verify(Workspace(experiment), repair=True)
    assert found.scope == "all"  # with a manifest unreadable, nobody knows what is used
    assert {check.key for check in found.damaged} == {
        block.index,
        f"{chain.first.training_set.path}/manifest.json",
    }
    assert verify(Workspace(experiment)).damaged == ()
    missing = {stage: lost for stage, _, lost in planned(experiment) if lost}
    assert missing == {stage: lost for stage, _, lost in before if lost} | {
        "sample references": block.rows,
        "training set": 1,
    }


def test_damaged_prompts_are_found_although_they_name_the_rest(steps: Any, settings: dict[str, Any]) -> None:
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    made = chain.workspace.artifacts.get(chain.prompts)
    flip(Path(experiment.store.path) / made.path("prompts.parquet"))
    found = verify(Workspace(experiment), repair=True)
    assert found.scope == "all"
    assert [check.key for check in found.damaged] == [made.path("prompts.parquet")]
    assert verify(Workspace(experiment)).damaged == ()


def test_verify_looks_at_what_the_experiment_uses_or_at_all(
    steps: Any, settings: dict[str, Any], other: Experiment
) -> None:
    experiment = steps.changed(settings)
    steps.precompute(experiment)
    chain, _ = steps.precompute(other)
    block = chain.workspace.blocks.committed(chain.first.rewards.recipe)[0]
    flip(Path(experiment.store.path) / block.file)
    assert verify(Workspace(experiment)).damaged == ()
    assert [check.key for check in verify(Workspace(experiment), everything=True).damaged] == [block.index]
    assert [check.key for check in verify(Workspace(other)).damaged] == [block.index]


# gc


def test_gc_in_the_middle_of_things_takes_nothing_away(
    steps: Any, settings: dict[str, Any], stages: Callable[[Experiment], Iterator[str]]
) -> None:
    experiment = steps.changed(settings, rounds={"count": 2, "samples_per_prompt": 2})
    for stage in stages(experiment):
        before, there = planned(experiment), files(experiment)
        assert sweep(experiment) == [], stage
        assert (planned(experiment), files(experiment)) == (before, there)
    assert not any(missing for stage, _, missing in planned(experiment) if stage not in ("evaluate", "report"))
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
    assert "To delete: 5 objects, 20 B. Only --apply deletes." in text
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
    more = parse_experiment({**settings, "reward": REWARD, "sampling": {**settings["sampling"], "references_per_prompt": 4}})
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


class _Cut(Exception):
    pass


class _Cutting:
    """Objects of a store whose deletions stop after some: a crash."""

    def __init__(self, workspace: Workspace, after: int) -> None:
        self._objects, self._left = workspace.objects, after

    def entries(self, prefix: str) -> Iterator[Any]:
        return self._objects.entries(prefix)

    def delete(self, key: str) -> None:
        if not self._left:
            raise _Cut
        self._left -= 1
        self._objects.delete(key)


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
            delete(_Cutting(Workspace(named_[0]), after), found)  # type: ignore[arg-type]
        except _Cut:
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


# compact


def test_compact_merges_the_experiments_blocks_and_no_others(
    steps: Any, settings: dict[str, Any], other: Experiment
) -> None:
    settings = settings | {"store": settings["store"] | {"rows_per_block": 5}}
    experiment = steps.changed(settings)
    chain, _ = steps.precompute(experiment)
    steps.precompute(other)
    before = planned(experiment)
    rows = chain.first.rewards.read()
    untouched = {name for name in files(experiment) if known_chain(Workspace(other)).first.rewards.recipe.key in name}
    large = steps.changed(settings, store={"rows_per_block": 1000})
    done = list(compact(Workspace(large)))
    assert {recipe.step: (made.before > 1, made.after) for recipe, made in done} == {
        "sample": (True, 1),
        "reward": (True, 1),
        "logprob": (True, 1),
    }
    assert planned(experiment) == before
    assert known_chain(Workspace(experiment)).first.rewards.read().equals(rows)
    assert untouched <= files(experiment).keys()
    assert collect(experiment, other) == []
    text = "\n".join(compaction_lines(done, "here"))
    assert "3 after" in text
    assert compaction_lines([], "here")[-1] == "No blocks of this experiment yet."
