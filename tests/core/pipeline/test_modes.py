"""Every mode from its rows to what the trainer takes, on the two-layer model with the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError, ObjectiveError
from qrpo_core.common.schemas import PAIRS, TRAINING_SET
from qrpo_core.config import Experiment, cache_key_fields
from qrpo_core.data.collator import Example, Pair
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.training_targets import TrainingData, derive
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute, prepare

SAMPLES = {"references_per_prompt": 6}


def data_of(steps: ExperimentSteps, experiment: Experiment | None = None) -> TrainingData:
    """The training set that a chain made, at its own objective or at another one."""
    workspace = steps.workspace if experiment is None else Workspace(experiment)
    return derive(workspace, workspace.artifacts.get(steps.first.training_set_recipe))


def texts(steps: ExperimentSteps, items: list[Any]) -> set[tuple[str, ...]]:
    """The completions of items as texts, so that a join by anything but the ids would show."""
    completions = steps.first.rewards.completions
    keys = [(prompt, index) for prompt, rows in completions.wanted.items() for index in rows]
    rows = completions.read(keys).to_pylist()
    text = {tuple(row["token_ids"]): row["text"] for row in rows}
    return {
        tuple(
            text[tuple(side.token_ids)]
            for side in ([item] if isinstance(item, Example) else (item.chosen, item.rejected))
        )
        for item in items
    }


def write_pairs(path: Path) -> None:
    rows = [
        {"prompt": f"Say {n}", "answer": n, "good": " ".join(["w"] * (n % 5)), "bad": " ".join(["w"] * 5)}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def paired(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    write_pairs(tmp_path / "questions.jsonl")
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    return {
        **settings,
        "prompts": settings["prompts"] | fields,
        "training_data": {"mode": "offline"},
    }


@pytest.mark.parametrize("kind", ["dpo", "simpo", "rebel", "sft"])
@pytest.mark.parametrize("data", [{"mode": "pairs"}, {"mode": "best_worst", "pool": 4}])
def test_one_training_set_serves_every_objective(
    settings: dict[str, Any], kind: str, data: dict[str, Any]
) -> None:
    settings = {**settings, "training_data": data, "sampling": settings["sampling"] | SAMPLES}
    steps, _ = precompute(changed(settings))
    baseline = changed(settings, objective={"kind": kind})
    _, computed = precompute(baseline)
    assert set(computed.values()) == {0}
    made = data_of(steps, baseline)
    pairs = steps.workspace.load(
        steps.workspace.artifacts.get(steps.first.training_set_recipe), "pairs.parquet", PAIRS
    )
    items = made.items()
    assert made.targets is None
    assert made.diagnostics["training_pairs"] == len(pairs) > 0
    if kind == "sft":
        assert all(isinstance(item, Example) for item in items)
        assert len(items) == len(pairs)
    else:
        assert all(isinstance(item, Pair) and item.chosen.reward > item.rejected.reward for item in items)


def test_pairs_join_by_id(settings: dict[str, Any]) -> None:
    settings = {**settings, "training_data": {"mode": "pairs"}, "sampling": settings["sampling"] | SAMPLES}
    steps, _ = precompute(changed(settings, objective={"kind": "dpo"}))
    rewards = {
        (row["prompt_id"], row["sample_index"]): row["reward"]
        for row in steps.first.rewards.read().to_pylist()
    }
    data = data_of(steps)
    for row, item in zip(data.pairs.to_pylist(), data.items(), strict=True):
        assert isinstance(item, Pair)
        assert item.chosen.reward == rewards[row["prompt_id"], row["chosen"]]
        assert item.rejected.reward == rewards[row["prompt_id"], row["rejected"]]
        assert {row["chosen"] // 2} == {row["rejected"] // 2}
        assert list(item.chosen.prompt_token_ids) == list(item.rejected.prompt_token_ids)


def test_best_worst_scores_log_probs_of_two_rows_a_prompt(settings: dict[str, Any]) -> None:
    data = {"mode": "best_worst", "pool": 4}
    steps, computed = precompute(changed({**settings, "training_data": data}, sampling=SAMPLES))
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert computed["sample references"] == 6 * prompts
    assert computed["score reference log-probs"] == 2 * prompts
    table = steps.workspace.load(
        steps.workspace.artifacts.get(steps.first.training_set_recipe),
        "training_set.parquet",
        TRAINING_SET,
    )
    assert set(table["n"].to_pylist()) == {2}  # the two outside the pool
    diagnostics = data_of(steps).diagnostics
    assert diagnostics["normalisation_mean"] == pytest.approx(diagnostics["normalisation_expected"])
    assert 0 <= diagnostics["quantile_distance_from_uniform"] <= 1


def test_random_trains_on_count_rows_and_a_larger_budget_only_sharpens_them(settings: dict[str, Any]) -> None:
    settings = {**settings, "training_data": {"mode": "random", "count": 2}}
    steps, _ = precompute(changed(settings))
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert len(data_of(steps).items()) == 2 * prompts
    more, computed = precompute(changed(settings, sampling=SAMPLES))
    assert computed == {
        "sample references": 3 * prompts,
        "annotate references": 3 * prompts,
        "score reference log-probs": 0,
    }
    assert texts(more, data_of(more).items()) == texts(steps, data_of(steps).items())
    assert set(data_of(more).table["n"].to_pylist()) == {5}


def test_offline_pairs_train_on_the_data_sets_texts(paired: dict[str, Any]) -> None:
    steps, computed = precompute(changed(paired))
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert computed["sample references"] == computed["annotate references"] == 3 * prompts
    assert computed["annotate offline completions"] == computed["score reference log-probs"] == 2 * prompts
    data = data_of(steps)
    assert {text for (text,) in texts(steps, data.items())} <= {" ".join(["w"] * n) for n in range(6)}
    assert not any(data.table["in_pool"].to_pylist())
    assert set(data.table["n"].to_pylist()) == {3}


def test_a_baseline_on_offline_pairs_draws_no_references(paired: dict[str, Any]) -> None:
    by_reward = changed(paired, objective={"kind": "dpo"}, training_data={"preference": "reward"})
    steps, computed = precompute(by_reward)
    assert set(computed) == {"annotate offline completions", "score reference log-probs"}
    assert all(isinstance(item, Pair) for item in data_of(steps).items())
    # QRPO afterwards adds the references and scores no completion again.
    _, more = precompute(changed(paired))
    assert more["annotate offline completions"] == more["score reference log-probs"] == 0
    assert more["sample references"] > 0


@pytest.mark.parametrize("kind", ["dpo", "simpo", "sft"])
def test_labels_need_no_reward_and_lose_no_pair(paired: dict[str, Any], kind: str) -> None:
    """The reward would say the opposite of every label."""
    backwards = paired["prompts"] | {"chosen_field": "bad", "rejected_field": "good"}
    settings = {**paired, "prompts": backwards, "reward": {"kind": "length", "max_words": 3}}
    steps, computed = precompute(changed(settings, objective={"kind": kind}))
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert computed == {"score reference log-probs": 2 * prompts}
    assert steps.first.nothing_to_learn() is None
    data = data_of(steps)
    bad = " ".join(["w"] * 5)
    assert len(data.items()) == prompts  # every pair, or the chosen side of every pair
    assert {sides[0] for sides in texts(steps, data.items())} == {bad}
    assert data.diagnostics["training_pairs"] == prompts
    # The recipe holds what "auto" means here: saying it gives the same artifacts.
    said = Workspace(changed(settings, objective={"kind": kind}, training_data={"preference": "label"}))
    assert stored_steps(said).first.train_recipe == steps.first.train_recipe


def test_rewards_that_contradict_the_labels_are_refused_unless_allowed(paired: dict[str, Any]) -> None:
    backwards = paired["prompts"] | {"chosen_field": "bad", "rejected_field": "good"}
    asked: dict[str, Any] = {"objective": {"kind": "dpo"}, "training_data": {"preference": "reward"}}
    settings = {**paired, "prompts": backwards, "reward": {"kind": "length", "max_words": 3}}
    steps, _ = precompute(changed(settings, **asked))
    facts = steps.workspace.artifacts.get(steps.first.quantiles_recipe).facts
    wrong = facts["label_contradicts_reward"]
    assert wrong == facts["labelled_pairs"] > 0
    problem = steps.first.nothing_to_learn()
    assert isinstance(problem, ObjectiveError)
    for part in (f"{wrong} of {wrong} pairs", "tie on 0", "100.0%", "max_contradicted = 0.5"):
        assert part in str(problem)
    asked["training_data"] |= {"max_contradicted": 1.0}
    allowed = stored_steps(Workspace(changed(settings, **asked)))
    assert allowed.first.train_recipe == steps.first.train_recipe  # a limit is part of no recipe
    assert allowed.first.nothing_to_learn() is None


def test_a_constant_reward_is_no_signal(settings: dict[str, Any], paired: dict[str, Any]) -> None:
    constant = {"reward": {"kind": "exact"}}  # nothing that the fake engine draws is right
    steps, _ = precompute(changed({**settings, **constant}))
    prompts = steps.first.rewards.completions.prompts.num_rows
    problem = str(steps.first.nothing_to_learn())
    assert f"on each of {prompts} prompts all rewards are equal (every reward is 0)" in problem
    assert f"ok {3 * prompts}" in problem
    by_reward = {"training_data": {"preference": "reward"}, "objective": {"kind": "dpo"}}
    steps, _ = precompute(changed({**paired, **constant}, **by_reward))
    assert "no pair of completions has unequal rewards" in str(steps.first.nothing_to_learn())
    steps, _ = precompute(changed({**paired, **constant}, objective={"kind": "dpo"}))
    assert steps.first.nothing_to_learn() is None  # labels decide


def test_rows_inserted_before_an_offline_completion_leave_its_rows_alone(
    paired: dict[str, Any], tmp_path: Path
) -> None:
    steps, _ = precompute(changed(paired))
    before = steps.first.rewards.completions.prompts.num_rows
    file = tmp_path / "questions.jsonl"
    lines = file.read_text().splitlines()
    added = [json.dumps({"prompt": f"Say {n}", "answer": n, "good": "a", "bad": "b"}) for n in range(50, 60)]
    file.write_text("\n".join([*added, *reversed(lines)]) + "\n")
    steps, computed = precompute(changed(paired))
    new = steps.first.rewards.completions.prompts.num_rows - before
    assert new > 0
    assert computed["annotate offline completions"] == computed["score reference log-probs"] == 2 * new


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ({"transform": "power", "exponent": 2.0}, {"transform": "square"}),
        ({"beta_scale": "by_length", "beta": 2.0, "beta_max": 0.2}, None),
        ({"transform": "scaled_normal", "normaliser": "empirical"}, None),
        ({"tie_method": "randomized", "normaliser": "population"}, None),
    ],
)
def test_every_setting_of_the_objective_reaches_the_targets(
    settings: dict[str, Any], objective: dict[str, Any], changes: dict[str, Any] | None
) -> None:
    settings = {**settings, "sampling": settings["sampling"] | SAMPLES}
    steps, _ = precompute(changed(settings))
    plain = data_of(steps).targets
    asked = changed(settings, objective=objective)
    made = data_of(steps, asked)
    assert made.targets is not None
    assert plain is not None
    assert made.targets.target.tolist() != plain.target.tolist()
    if changes is not None:  # x^2 is x^2 by either name
        same = data_of(steps, changed(settings, objective=changes)).targets
        assert same is not None
        assert made.targets.target.tolist() == pytest.approx(same.target.tolist(), rel=1e-12)
    if asked.objective.beta_max is not None:
        lengths = [len(ids) for ids in made.table["token_ids"].to_pylist()]
        assert made.targets.beta.tolist() == [min(2.0 / length, 0.2) for length in lengths]
        assert made.diagnostics["beta_max_binds"] == sum(2.0 / length > 0.2 for length in lengths)


def test_prompts_with_too_few_references_for_the_transform_are_counted(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings))
    with pytest.raises(ObjectiveError, match="4 scored references that transform 'normal' needs"):
        data_of(steps, changed(settings, objective={"transform": "normal"}))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"transform": "normal"}}, "set it to 4 or more"),
        ({"sampling": {"references_per_prompt": 1}}, "set it to 2 or more"),
        ({"training_data": {"mode": "best_worst", "pool": 2}}, "set it to 4 or more"),
    ],
)
def test_a_budget_that_cannot_do_is_refused_before_anything_is_drawn(
    settings: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check(Workspace(changed(settings, **sections)))


def test_offline_without_completions_is_refused(paired: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": None, "bad": None} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="training prompts has a completion of its own"):
        check(Workspace(changed(paired)))


def test_what_can_be_run_passes_the_check(settings: dict[str, Any], paired: dict[str, Any]) -> None:
    for each in (settings, paired):  # from the source, then from the store
        check(Workspace(changed(each)))
        precompute(changed(each))
        check(Workspace(changed(each)))


def test_rounds_draw_from_the_trained_policy_and_rank_among_the_first_references(
    settings: dict[str, Any],
) -> None:
    from qrpo_core.pipeline import training
    from qrpo_core.pipeline.row_steps import SampleStep

    asked = changed(
        settings, rounds={"count": 2, "samples_per_prompt": 2}, sampling={"engine": "transformers"}
    )
    steps, _ = precompute(asked)
    workspace = steps.workspace
    assert [round_.number for round_ in steps.planned_rounds()] == [1]
    data = workspace.artifacts.get(steps.first.training_set_recipe)
    training.build(workspace, steps.first.train_recipe, data, steps.first.start)
    second = steps.round(2)
    assert second.start.digest != steps.reference.digest
    drawn = second.row_steps[0]
    assert isinstance(drawn, SampleStep)
    assert drawn.policy.digest == second.start.digest
    computed = prepare(workspace, second)
    prompts = steps.first.rewards.completions.prompts.num_rows
    assert computed == {
        "sample completions, round 2": 2 * prompts,
        "annotate completions, round 2": 2 * prompts,
        "score reference log-probs, round 2": 2 * prompts,
    }
    table = workspace.load(
        workspace.artifacts.get(second.training_set_recipe), "training_set.parquet", TRAINING_SET
    )
    references = {}
    for row in steps.first.rewards.read().to_pylist():
        references.setdefault(row["prompt_id"], []).append(row["reward"])
    for row in table.to_pylist():
        others = references[row["prompt_id"]]
        assert not row["in_pool"]
        assert row["n"] == 3
        assert row["below"] == sum(other < row["reward"] for other in others)
    # The anchor stays the reference policy, not the round's start.
    assert second.logprobs.policy.digest == steps.reference.digest


def test_the_number_of_rounds_is_in_no_recipe(settings: dict[str, Any]) -> None:
    fields = cache_key_fields(changed(settings, rounds={"count": 3}).rounds)
    assert set(fields) == {"samples_per_prompt"}
