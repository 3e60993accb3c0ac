"""What `plan` says before a change is what the run after it does: over random sequences of changes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute, write_questions


def _with_others(first: list[int]) -> st.SearchStrategy[list[int]]:
    """Ten prompts, among which some are held out, in any order, and others anywhere between them."""
    others = st.lists(st.integers(10, 30), max_size=4, unique=True)
    return st.tuples(others, st.integers(0, 10)).map(
        lambda more: first[: more[1]] + more[0] + first[more[1] :]
    )


#: One change: of the number of references, of the source, of the draw, of the scorer, of what is trained on,
#: of some prompts' budgets, of the size of blocks.
CHANGES = st.one_of(
    st.tuples(st.just("references"), st.integers(4, 7)),
    st.tuples(st.just("prompts"), st.permutations(range(10)).flatmap(_with_others)),
    st.tuples(st.just("temperature"), st.sampled_from([1.0, 0.7])),
    st.tuples(st.just("reward"), st.sampled_from(["length", "sentiment"])),
    st.tuples(st.just("mode"), st.sampled_from(["random", "two", "pairs", "best_worst"])),
    st.tuples(st.just("budget"), st.dictionaries(st.integers(0, 5), st.integers(0, 9), max_size=4)),
    st.tuples(st.just("block"), st.integers(1, 9)),
)
MODES: dict[str, dict[str, Any]] = {
    "random": {"mode": "random"},
    "two": {"mode": "random", "count": 2},
    "pairs": {"mode": "pairs"},
    "best_worst": {"mode": "best_worst", "pool": 2},
}
REWARDS: dict[str, dict[str, Any]] = {
    "length": {"kind": "length", "max_words": 1},
    "sentiment": {"kind": "sentiment"},
}
START = {"references": 4, "prompts": list(range(10)), "temperature": 1.0, "reward": "length"}
START |= {"mode": "random", "budget": {}, "block": 4}


def experiment(base: dict[str, Any], folder: Path, state: dict[str, Any]) -> Any:
    write_questions(folder / "questions.jsonl", state["prompts"])
    made = {
        **base,
        "prompts": base["prompts"] | {"path": str(folder / "questions.jsonl"), "held_out": 0.2},
        "sampling": base["sampling"]
        | {"references_per_prompt": state["references"], "temperature": state["temperature"]},
        "reward": REWARDS[state["reward"]],
        "training_data": MODES[state["mode"]],
        "store": {"path": str(folder / "store"), "rows_per_block": state["block"]},
    }
    return changed(made)


def apply_budget(workspace: Workspace, budget: dict[int, int]) -> None:
    samples, rewards = reference_steps(workspace)
    prompts = sorted(samples.prompts["prompt_id"].to_pylist())
    asked = {prompts[number]: count for number, count in budget.items() if number < len(prompts)}
    budgets.write(workspace.objects, samples.recipe, rewards.recipe, asked)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(CHANGES, min_size=1, max_size=4))
def test_plan_then_run_then_nothing_is_planned(
    settings: dict[str, Any], changes: list[tuple[str, Any]]
) -> None:
    state: dict[str, Any] = dict(START)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        precompute(experiment(settings, folder, state))
        for name, value in changes:
            state[name] = value
            asked = experiment(settings, folder, state)
            if name == "budget":
                apply_budget(Workspace(asked), value) if _has_prompts(asked) else None
            announced = {stage.stage: stage.missing for stage in plan(Workspace(asked))}
            _, computed = precompute(asked)
            assert {label: announced[label] for label in computed} == computed
            left = {stage.stage: stage.missing for stage in plan(Workspace(asked))}
            assert [label for label in computed if left[label]] == []
            assert not left["prepare prompts"] + left["compute quantiles"] + left["assemble training set"]


def _has_prompts(asked: Any) -> bool:
    """Whether the store knows the prompts, which a budget is for."""
    workspace = Workspace(asked)
    return not next(stage for stage in plan(workspace) if stage.stage == "prepare prompts").missing
