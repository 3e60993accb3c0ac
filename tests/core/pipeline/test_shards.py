"""Shares: parts of a step's missing rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError
from qrpo_core.pipeline.policies import folder_files
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.shards import Shard, ShardStep, split, step_of
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import RowRange
from qrpo_core.store.recipe import Recipe
from tests.core.small_experiment import changed, precompute, prepare

RECIPE = Recipe("sample", 1, {}, {})


def step(**wanted: Any) -> Any:
    return SimpleNamespace(label="sample references", recipe=RECIPE, wanted=wanted)


keys = st.text("0123456789abcdef", min_size=1, max_size=4)
row_ranges = st.lists(
    st.builds(RowRange, keys, st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=60
)


@given(row_ranges, st.integers(1, 9))
def test_every_key_is_in_exactly_one_share_and_shares_are_even(missing: list[RowRange], count: int) -> None:
    found = split(step(), missing, count)
    assert 1 <= len(found) <= count
    for key in [row_range.key for row_range in missing] + ["", "7", "zz"]:
        assert sum(share.holds(key) for share in found) == 1
    rows: dict[str, int] = {}
    for row_range in missing:
        rows[row_range.key] = rows.get(row_range.key, 0) + row_range.count
    sizes = [sum(n for key, n in rows.items() if share.holds(key)) for share in found]
    assert all(sizes)
    # No boundary is further from an equal part than half of the largest key on either side.
    assert max(sizes) <= sum(rows.values()) / count + max(rows.values())


@given(row_ranges, st.integers(1, 9))
def test_as_many_shares_as_asked_for_where_there_are_keys(missing: list[RowRange], count: int) -> None:
    even = [
        RowRange(row_range.key, 0, 5)
        for row_range in {row_range.key: row_range for row_range in missing}.values()
    ]
    assert len(split(step(), even, count)) == min(count, len(even))


def test_a_share_travels_as_json() -> None:
    for share in split(step(), [RowRange("a", 0, 4), RowRange("b", 0, 4)], 2):
        assert Shard.model_validate_json(share.model_dump_json()) == share
        assert share.recipe == RECIPE.key
        assert share.stage == "sample references"


def test_a_share_of_a_step_wants_its_keys_alone() -> None:
    whole = step(a=range(4), b=range(4), c=range(2, 4))
    first, second = split(whole, [RowRange("a", 0, 4), RowRange("b", 3, 1), RowRange("c", 2, 2)], 2)
    assert ShardStep(whole, first).wanted == {"a": range(4)}
    # Those that the share has already are wanted too: what is missing is seen when it is computed.
    assert ShardStep(whole, second).wanted == {"b": range(4), "c": range(2, 4)}


@pytest.mark.parametrize("extra", [{"last": "x"}, {"stage": 4}])
def test_a_share_of_another_form_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))):
        Shard.model_validate({"stage": "s", "recipe": "r", **extra})


def test_every_step_of_a_run_is_found_by_the_shard_of_it(
    settings: dict[str, Any], make_tiny_model: Any, tmp_path: Path
) -> None:
    """Of both rounds, of the evaluation and of its judges, as soon as the store knows enough of them."""
    judge = {"kind": "length", "max_words": 3}
    asked = changed(
        settings, rounds={"count": 2, "samples_per_prompt": 2}, evaluation={"judges": {"long": judge}}
    )
    steps, _ = precompute(asked)
    workspace = steps.workspace

    def found(wanted: BlockStep) -> ShardStep:
        shard = Shard(stage=wanted.label, recipe=wanted.recipe.key)
        return step_of(Workspace(asked), shard)

    with pytest.raises(ConfigError, match=r"no stage is called 'other': one of .*sample held-out, before"):
        step_of(Workspace(asked), Shard(stage="other", recipe="r"))
    known: list[BlockStep] = [*steps.first.row_steps, steps.first.logprobs, *steps.before]
    for number in (1, 2):
        round_ = steps.round(number)
        if number == 2:
            prepare(workspace, round_)
            known += [*round_.row_steps, round_.logprobs]
        model = make_tiny_model(tmp_path / f"round{number}" / "policy")
        (model / "merges.txt").write_text(f"#{number}")  # not read, but it makes another policy of each
        workspace.artifacts.commit(round_.train_recipe, folder_files(model), {"rows": 1, "steps": 1}, 0.0)
    end = steps.after(steps.last())
    known += [*end.after, *end.divergence]
    assert len({each.label for each in known}) == len(known) == 14
    for each in known:
        part = found(each)
        assert (part.label, part.recipe, part.wanted) == (each.label, each.recipe, each.wanted)
    with pytest.raises(ConfigError, match="this worker would compute"):
        step_of(Workspace(asked), Shard(stage=known[-1].label, recipe="another"))
