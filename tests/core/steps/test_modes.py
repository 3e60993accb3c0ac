"""Every mode from its rows to what the trainer takes, on the two-layer model with the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment, recipe_fields
from qrpo_core.data.collator import Example, Pair
from qrpo_core.errors import ConfigError, DataError, ObjectiveError
from qrpo_core.preflight import check
from qrpo_core.records import PAIRS, TRAINING_SET
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.tables import load
from qrpo_core.steps.targets import TrainingData, derive
from qrpo_core.steps.workspace import Workspace

SAMPLES = {"references_per_prompt": 6}


def data_of(chain: Chain, experiment: Experiment | None = None) -> TrainingData:
    """The training set that a chain made, at its own objective or at another one."""
    workspace = chain.workspace if experiment is None else Workspace(experiment)
    return derive(workspace, workspace.artifacts.get(chain.first.training_set))


def texts(chain: Chain, items: list[Any]) -> set[tuple[str, ...]]:
    """The completions of items as texts, so that a join by anything but the ids would show."""
    completions = chain.first.rewards.completions
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
    steps: Any, settings: dict[str, Any], kind: str, data: dict[str, Any]
) -> None:
    settings = {**settings, "training_data": data, "sampling": settings["sampling"] | SAMPLES}
    chain, _ = steps.precompute(steps.changed(settings))
    baseline = steps.changed(settings, objective={"kind": kind})
    _, computed = steps.precompute(baseline)
    assert set(computed.values()) == {0}
    made = data_of(chain, baseline)
    pairs = load(
        chain.workspace, chain.workspace.artifacts.get(chain.first.training_set), "pairs.parquet", PAIRS
    )
    items = made.items()
    assert made.targets is None
    assert made.diagnostics["training_pairs"] == len(pairs) > 0
    if kind == "sft":
        assert all(isinstance(item, Example) for item in items)
        assert len(items) == len(pairs)
    else:
        assert all(isinstance(item, Pair) and item.chosen.reward > item.rejected.reward for item in items)


def test_pairs_join_by_id(steps: Any, settings: dict[str, Any]) -> None:
    settings = {**settings, "training_data": {"mode": "pairs"}, "sampling": settings["sampling"] | SAMPLES}
    chain, _ = steps.precompute(steps.changed(settings, objective={"kind": "dpo"}))
    rewards = {
        (row["prompt_id"], row["sample_index"]): row["reward"]
        for row in chain.first.rewards.read().to_pylist()
    }
    data = data_of(chain)
    for row, item in zip(data.pairs.to_pylist(), data.items(), strict=True):
        assert isinstance(item, Pair)
        assert item.chosen.reward == rewards[row["prompt_id"], row["chosen"]]
        assert item.rejected.reward == rewards[row["prompt_id"], row["rejected"]]
        assert {row["chosen"] // 2} == {row["rejected"] // 2}
        assert item.chosen.prompt_token_ids == item.rejected.prompt_token_ids


def test_best_worst_scores_log_probs_of_two_rows_a_prompt(steps: Any, settings: dict[str, Any]) -> None:
    data = {"mode": "best_worst", "pool": 4}
    chain, computed = steps.precompute(steps.changed({**settings, "training_data": data}, sampling=SAMPLES))
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert computed["sample references"] == 6 * prompts
    assert computed["reference log-probs"] == 2 * prompts
    table = load(
        chain.workspace,
        chain.workspace.artifacts.get(chain.first.training_set),
        "training_set.parquet",
        TRAINING_SET,
    )
    assert set(table["n"].to_pylist()) == {2}  # the two outside the pool
    diagnostics = data_of(chain).diagnostics
    assert diagnostics["normalisation_mean"] == pytest.approx(1.0)
    assert 0 <= diagnostics["quantile_distance_from_uniform"] <= 1


def test_random_trains_on_count_rows_and_a_larger_budget_only_sharpens_them(
    steps: Any, settings: dict[str, Any]
) -> None:
    settings = {**settings, "training_data": {"mode": "random", "count": 2}}
    chain, _ = steps.precompute(steps.changed(settings))
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert len(data_of(chain).items()) == 2 * prompts
    more, computed = steps.precompute(steps.changed(settings, sampling=SAMPLES))
    assert computed == {
        "sample references": 3 * prompts,
        "score references": 3 * prompts,
        "reference log-probs": 0,
    }
    assert texts(more, data_of(more).items()) == texts(chain, data_of(chain).items())
    assert set(data_of(more).table["n"].to_pylist()) == {5}


def test_offline_pairs_train_on_the_data_sets_texts(steps: Any, paired: dict[str, Any]) -> None:
    chain, computed = steps.precompute(steps.changed(paired))
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert computed["sample references"] == computed["score references"] == 3 * prompts
    assert computed["score offline completions"] == computed["reference log-probs"] == 2 * prompts
    data = data_of(chain)
    assert {text for (text,) in texts(chain, data.items())} <= {" ".join(["w"] * n) for n in range(6)}
    assert not any(data.table["in_pool"].to_pylist())
    assert set(data.table["n"].to_pylist()) == {3}


def test_a_baseline_on_offline_pairs_draws_no_references(steps: Any, paired: dict[str, Any]) -> None:
    by_reward = steps.changed(paired, objective={"kind": "dpo"}, training_data={"preference": "reward"})
    chain, computed = steps.precompute(by_reward)
    assert set(computed) == {"score offline completions", "reference log-probs"}
    assert all(isinstance(item, Pair) for item in data_of(chain).items())
    # QRPO afterwards adds the references and scores no completion again.
    _, more = steps.precompute(steps.changed(paired))
    assert more["score offline completions"] == more["reference log-probs"] == 0
    assert more["sample references"] > 0


@pytest.mark.parametrize("kind", ["dpo", "simpo", "sft"])
def test_labels_need_no_reward_and_lose_no_pair(steps: Any, paired: dict[str, Any], kind: str) -> None:
    """The reward would say the opposite of every label."""
    backwards = paired["prompts"] | {"chosen_field": "bad", "rejected_field": "good"}
    settings = {**paired, "prompts": backwards, "reward": {"kind": "length", "max_words": 3}}
    chain, computed = steps.precompute(steps.changed(settings, objective={"kind": kind}))
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert computed == {"reference log-probs": 2 * prompts}
    assert chain.first.nothing_to_learn() is None
    data = data_of(chain)
    bad = " ".join(["w"] * 5)
    assert len(data.items()) == prompts  # every pair, or the chosen side of every pair
    assert {sides[0] for sides in texts(chain, data.items())} == {bad}
    assert data.diagnostics["training_pairs"] == prompts
    # The recipe holds what "auto" means here: saying it gives the same artifacts.
    said = Workspace(steps.changed(settings, objective={"kind": kind}, training_data={"preference": "label"}))
    assert stored_chain(said).first.train == chain.first.train


def test_rewards_that_contradict_the_labels_are_refused_unless_allowed(
    steps: Any, paired: dict[str, Any]
) -> None:
    backwards = paired["prompts"] | {"chosen_field": "bad", "rejected_field": "good"}
    asked: dict[str, Any] = {"objective": {"kind": "dpo"}, "training_data": {"preference": "reward"}}
    settings = {**paired, "prompts": backwards, "reward": {"kind": "length", "max_words": 3}}
    chain, _ = steps.precompute(steps.changed(settings, **asked))
    facts = chain.workspace.artifacts.get(chain.first.quantiles).facts
    wrong = facts["label_contradicts_reward"]
    assert wrong == facts["labelled_pairs"] > 0
    problem = chain.first.nothing_to_learn()
    assert isinstance(problem, ObjectiveError)
    for part in (f"{wrong} of {wrong} pairs", "tie on 0", "100.0%", "max_contradicted = 0.5"):
        assert part in str(problem)
    asked["training_data"] |= {"max_contradicted": 1.0}
    allowed = stored_chain(Workspace(steps.changed(settings, **asked)))
    assert allowed.first.train == chain.first.train  # a limit is part of no recipe
    assert allowed.first.nothing_to_learn() is None


def test_a_constant_reward_is_no_signal(steps: Any, settings: dict[str, Any], paired: dict[str, Any]) -> None:
    constant = {"reward": {"kind": "exact"}}  # nothing that the fake engine draws is right
    chain, _ = steps.precompute(steps.changed({**settings, **constant}))
    prompts = chain.first.rewards.completions.prompts.num_rows
    problem = str(chain.first.nothing_to_learn())
    assert f"on each of {prompts} prompts all rewards are equal (every reward is 0)" in problem
    assert f"ok {3 * prompts}" in problem
    by_reward = {"training_data": {"preference": "reward"}, "objective": {"kind": "dpo"}}
    chain, _ = steps.precompute(steps.changed({**paired, **constant}, **by_reward))
    assert "no pair of completions has unequal rewards" in str(chain.first.nothing_to_learn())
    chain, _ = steps.precompute(steps.changed({**paired, **constant}, objective={"kind": "dpo"}))
    assert chain.first.nothing_to_learn() is None  # labels decide


def test_rows_inserted_before_an_offline_completion_leave_its_rows_alone(
    steps: Any, paired: dict[str, Any], tmp_path: Path
) -> None:
    chain, _ = steps.precompute(steps.changed(paired))
    before = chain.first.rewards.completions.prompts.num_rows
    file = tmp_path / "questions.jsonl"
    lines = file.read_text().splitlines()
    added = [json.dumps({"prompt": f"Say {n}", "answer": n, "good": "a", "bad": "b"}) for n in range(50, 60)]
    file.write_text("\n".join([*added, *reversed(lines)]) + "\n")
    chain, computed = steps.precompute(steps.changed(paired))
    new = chain.first.rewards.completions.prompts.num_rows - before
    assert new > 0
    assert computed["score offline completions"] == computed["reference log-probs"] == 2 * new


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ({"transform": "power", "exponent": 2.0}, {"transform": "square"}),
        ({"beta_scale": "by_length", "beta": 2.0, "beta_max": 0.2}, None),
        ({"transform": "scaled_normal", "normaliser": "empirical"}, None),
        ({"convention": "randomized", "normaliser": "population"}, None),
    ],
)
def test_every_setting_of_the_objective_reaches_the_targets(
    steps: Any, settings: dict[str, Any], objective: dict[str, Any], changes: dict[str, Any] | None
) -> None:
    settings = {**settings, "sampling": settings["sampling"] | SAMPLES}
    chain, _ = steps.precompute(steps.changed(settings))
    plain = data_of(chain).targets
    asked = steps.changed(settings, objective=objective)
    made = data_of(chain, asked)
    assert made.targets is not None
    assert plain is not None
    assert made.targets.target.tolist() != plain.target.tolist()
    if changes is not None:  # x^2 is x^2 by either name
        same = data_of(chain, steps.changed(settings, objective=changes)).targets
        assert same is not None
        assert made.targets.target.tolist() == pytest.approx(same.target.tolist(), rel=1e-12)
    if asked.objective.beta_max is not None:
        lengths = [len(ids) for ids in made.table["token_ids"].to_pylist()]
        assert made.targets.beta.tolist() == [min(2.0 / length, 0.2) for length in lengths]
        assert made.diagnostics["beta_max_binds"] == sum(2.0 / length > 0.2 for length in lengths)


def test_prompts_with_too_few_references_for_the_transform_are_counted(
    steps: Any, settings: dict[str, Any]
) -> None:
    chain, _ = steps.precompute(steps.changed(settings))
    with pytest.raises(ObjectiveError, match="4 scored references that transform 'normal' needs"):
        data_of(chain, steps.changed(settings, objective={"transform": "normal"}))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"transform": "normal"}}, "set it to 4 or more"),
        ({"sampling": {"references_per_prompt": 1}}, "set it to 2 or more"),
        ({"training_data": {"mode": "best_worst", "pool": 2}}, "set it to 4 or more"),
    ],
)
def test_a_budget_that_cannot_do_is_refused_before_anything_is_drawn(
    steps: Any, settings: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check(Workspace(steps.changed(settings, **sections)))


def test_offline_without_completions_is_refused(steps: Any, paired: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": None, "bad": None} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="training prompts has a completion of its own"):
        check(Workspace(steps.changed(paired)))


def test_what_can_be_run_passes_the_check(
    steps: Any, settings: dict[str, Any], paired: dict[str, Any]
) -> None:
    for each in (settings, paired):  # from the source, then from the store
        check(Workspace(steps.changed(each)))
        steps.precompute(steps.changed(each))
        check(Workspace(steps.changed(each)))


def test_rounds_draw_from_the_trained_policy_and_rank_among_the_first_references(
    steps: Any, settings: dict[str, Any]
) -> None:
    from qrpo_core.steps import training
    from qrpo_core.steps.blocks import SampleStep

    asked = steps.changed(
        settings, rounds={"count": 2, "samples_per_prompt": 2}, sampling={"engine": "transformers"}
    )
    chain, _ = steps.precompute(asked)
    workspace = chain.workspace
    assert [round_.number for round_ in chain.planned_rounds()] == [1]
    data = workspace.artifacts.get(chain.first.training_set)
    training.build(workspace, chain.first.train, data, chain.first.start)
    second = chain.round(2)
    assert second.start.digest != chain.reference.digest
    drawn = second.row_steps[0]
    assert isinstance(drawn, SampleStep)
    assert drawn.policy.digest == second.start.digest
    computed = steps.prepare(workspace, second)
    prompts = chain.first.rewards.completions.prompts.num_rows
    assert computed == {
        "sample, round 2": 2 * prompts,
        "score, round 2": 2 * prompts,
        "reference log-probs, round 2": 2 * prompts,
    }
    table = load(
        workspace, workspace.artifacts.get(second.training_set), "training_set.parquet", TRAINING_SET
    )
    references = {}
    for row in chain.first.rewards.read().to_pylist():
        references.setdefault(row["prompt_id"], []).append(row["reward"])
    for row in table.to_pylist():
        others = references[row["prompt_id"]]
        assert not row["in_pool"]
        assert row["n"] == 3
        assert row["below"] == sum(other < row["reward"] for other in others)
    # The anchor stays the reference policy, not the round's start.
    assert second.logprobs.policy.digest == chain.reference.digest


def test_the_number_of_rounds_is_in_no_recipe(steps: Any, settings: dict[str, Any]) -> None:
    fields = recipe_fields(steps.changed(settings, rounds={"count": 3}).rounds)
    assert set(fields) == {"samples_per_prompt"}
