"""Shares: parts of a step's missing rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.steps.shares import Share, ShareStep, split
from qrpo_core.store.blocks import Run
from qrpo_core.store.recipe import Recipe

RECIPE = Recipe("sample", 1, {}, {})


def step(**wanted: Any) -> Any:
    return SimpleNamespace(label="sample references", recipe=RECIPE, wanted=wanted)


keys = st.text("0123456789abcdef", min_size=1, max_size=4)
runs = st.lists(st.builds(Run, keys, st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=60)


@given(runs, st.integers(1, 9))
def test_every_key_is_in_exactly_one_share_and_shares_are_even(missing: list[Run], count: int) -> None:
    found = split(step(), missing, count)
    assert 1 <= len(found) <= count
    for key in [run.key for run in missing] + ["", "7", "zz"]:
        assert sum(share.holds(key) for share in found) == 1
    rows: dict[str, int] = {}
    for run in missing:
        rows[run.key] = rows.get(run.key, 0) + run.count
    sizes = [sum(n for key, n in rows.items() if share.holds(key)) for share in found]
    assert all(sizes)
    # No boundary is further from an equal part than half of the largest key on either side.
    assert max(sizes) <= sum(rows.values()) / count + max(rows.values())


@given(runs, st.integers(1, 9))
def test_as_many_shares_as_asked_for_where_there_are_keys(missing: list[Run], count: int) -> None:
    even = [Run(run.key, 0, 5) for run in {run.key: run for run in missing}.values()]
    assert len(split(step(), even, count)) == min(count, len(even))


def test_a_share_travels_as_json() -> None:
    for share in split(step(), [Run("a", 0, 4), Run("b", 0, 4)], 2):
        assert Share.model_validate_json(share.model_dump_json()) == share
        assert share.recipe == RECIPE.key
        assert share.stage == "sample references"


def test_a_share_of_a_step_wants_its_keys_alone() -> None:
    whole = step(a=range(4), b=range(4), c=range(2, 4))
    first, second = split(whole, [Run("a", 0, 4), Run("b", 3, 1), Run("c", 2, 2)], 2)
    assert ShareStep(whole, first).wanted == {"a": range(4)}
    # Those that the share has already are wanted too: what is missing is seen when it is computed.
    assert ShareStep(whole, second).wanted == {"b": range(4), "c": range(2, 4)}


@pytest.mark.parametrize("extra", [{"last": "x"}, {"stage": 4}])
def test_a_share_of_another_form_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))):
        Share.model_validate({"stage": "s", "recipe": "r", **extra})
