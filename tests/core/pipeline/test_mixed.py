"""Mode mixed: a sample and a completion of the data set a prompt, each as its own mode has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment
from qrpo_core.data.collator import Pair
from qrpo_core.inspection.data_set import export
from qrpo_core.inspection.explain.explanation import explain
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.selection import select
from qrpo_core.pipeline.training_targets import TrainingData, derive
from tests.core.pipeline.test_selection import SCORES, Scores, by_prompt, mode, pairs_of, rewards, scored
from tests.core.small_experiment import changed, precompute

#: The prompt without a completion of the data set.
BARE = 3


@pytest.fixture
def graded(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [
        {
            "prompt": f"Say {n}",
            "answer": n,
            "tries": []
            if n == BARE
            else [{"text": "w " * (n % 4) + str(k), "grade": n / 4} for k in range(2)],
        }
        for n in range(12)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        "completion_fields": ["tries"],
        "completion_text_field": "text",
        "completion_reward_field": "grade",
        "held_out": 0.2,
    }
    return {**settings, "prompts": settings["prompts"] | fields, "training_data": {"mode": "mixed"}}


def data_of(steps: ExperimentSteps) -> TrainingData:
    return derive(steps.workspace, steps.workspace.artifacts.get(steps.first.training_set_recipe))


def targets_of(steps: ExperimentSteps) -> dict[tuple[str, int], tuple[float, ...]]:
    """What the trainer gets of each row: target, beta, log Z, reference log-prob, and its tokens."""
    data = data_of(steps)
    assert data.targets is not None
    columns = (
        data.targets.target,
        data.targets.beta,
        data.targets.log_partition,
        data.table["ref_logprob"].to_pylist(),
        map(tuple, data.table["token_ids"].to_pylist()),
    )
    ids = zip(data.table["prompt_id"].to_pylist(), data.table["sample_index"].to_pylist(), strict=True)
    return dict(zip(ids, zip(*columns, strict=True), strict=True))


@given(SCORES, SCORES)
def test_it_takes_sample_0_and_the_smallest_number_of_each_prompt_with_both(
    drawn: Scores, own: Scores
) -> None:
    table = rewards(drawn)
    chosen = select(mode("mixed"), table, table, own=rewards(own))
    first = {p: rows[0] for p, rows in scored(drawn).items() if 0 in rows}
    given = {p: {i: r for i, r in rows.items() if i > 0} for p, rows in scored(own).items()}
    given = {p: rows for p, rows in given.items() if rows}
    both = first.keys() & given.keys()
    assert by_prompt(chosen.rows) == {p: {0, min(given[p])} for p in both}
    rows = zip(chosen.rows["sample_index"].to_pylist(), chosen.in_pool, strict=True)  # type: ignore[arg-type]
    assert all((index == 0) == inside for index, inside in rows)
    better = {(p, first[p] - given[p][min(given[p])]) for p in both}
    assert {(p, 0 if c == 0 else -1) for p, c, _ in pairs_of(chosen)} == {
        (p, 0 if lead > 0 else -1) for p, lead in better if lead
    }
    assert chosen.facts["tied_pairs"] == sum(not lead for _, lead in better)
    assert chosen.facts["unpaired_rows"] == len(first) + len(given) - 2 * len(both)
    assert chosen.references is not None
    assert by_prompt(chosen.references) == {p: set(rows) for p, rows in scored(drawn).items()}


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"normaliser": "population", "tie_tolerance": 1},
        {"normaliser": "empirical", "tie_method": "mid"},
        {"normaliser": "population", "tie_method": "randomized"},
        {"beta_scale": "by_length", "beta": 5.0, "beta_max": 0.1},
        {"kind": "tup"},
        {"kind": "a_star"},
    ],
)
def test_every_target_is_that_of_its_own_mode(graded: dict[str, Any], objective: dict[str, Any]) -> None:
    """At the same references: the data set of the other modes lacks the prompt that has one source only."""
    rows = [json.loads(line) for line in Path(graded["prompts"]["path"]).read_text().splitlines()]
    full = [row for row in rows if row["tries"]]
    Path(graded["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in full))
    both = targets_of(precompute(changed(graded, objective=objective))[0])
    pure: dict[tuple[str, int], tuple[float, ...]] = {}
    for data in ({"mode": "random", "count": 1}, {"mode": "offline"}):
        steps, computed = precompute(changed(graded | {"training_data": data}, objective=objective))
        rows_of = targets_of(steps)
        assert not rows_of.keys() & pure.keys()
        pure |= rows_of
        # The other completion of the data set is new in mode offline, and nothing else in either mode.
        assert sum(computed.values()) == len(rows_of) - len(both) / 2
    assert both.keys() < pure.keys()
    assert both == {row: pure[row] for row in both}  # to the last bit


def test_the_rows_are_counted_and_a_prompt_without_both_is_left_out(graded: dict[str, Any]) -> None:
    experiment = changed(graded)
    steps, computed = precompute(experiment)
    prompts = steps.first.rewards.completions.prompts.num_rows
    bare = len(steps.first.rewards.completions.wanted) - len(steps.first.own.completions.wanted)  # type: ignore[union-attr]
    assert bare == 1
    assert computed == {
        "sample references": 3 * prompts,
        "annotate references": 3 * prompts,
        "annotate offline completions": 2 * (prompts - bare),
        "score reference log-probs": prompts - bare,
        "score reference log-probs, offline": prompts - bare,
    }
    facts = steps.workspace.artifacts.get(steps.first.training_set_recipe).facts
    each = prompts - bare
    assert facts["rows"] == 2 * each
    assert facts["sources"] == {"samples": each, "data_set": each}
    quantiles = steps.workspace.artifacts.get(steps.first.quantiles_recipe).facts
    assert quantiles["prompts_left_out"] == quantiles["unpaired_rows"] == bare
    data = data_of(steps)
    assert data.diagnostics["training_samples"] == data.diagnostics["training_offline"] == each
    assert sorted(set(data.table["n"].to_pylist())) == [2, 3]
    assert 0 <= data.diagnostics["quantile_distance_from_uniform"] <= 1
    stages = {stage.stage: stage for stage in plan(steps.workspace)}
    assert stages["score reference log-probs, offline"].present == each
    assert stages["train policy"].passes == 2 * each


def test_the_plan_of_an_empty_store_expects_one_of_each(graded: dict[str, Any]) -> None:
    from qrpo_core.pipeline.workspace import Workspace

    stages = {stage.stage: stage for stage in plan(Workspace(changed(graded)))}
    sampled, own = (stages[f"score reference log-probs{end}"].missing for end in ("", ", offline"))
    assert sampled == own  # without the prompt that has no completion of its own
    assert stages["train policy"].passes == sampled + own


def test_baselines_prefer_one_of_the_two(graded: dict[str, Any]) -> None:
    steps, _ = precompute(changed(graded, objective={"kind": "dpo"}))
    data = data_of(steps)
    rows = {
        (row["prompt_id"], row["sample_index"]): row["reward"]
        for row in data.table.select(["prompt_id", "sample_index", "reward"]).to_pylist()
    }
    assert len(data.items())
    for pair, item in zip(data.pairs.to_pylist(), data.items(), strict=True):
        assert isinstance(item, Pair)
        assert 0 in (pair["chosen"], pair["rejected"])
        chosen, rejected = (rows[pair["prompt_id"], pair[side]] for side in ("chosen", "rejected"))
        assert item.chosen.reward == chosen > rejected == item.rejected.reward


def test_given_grades_are_taken(graded: dict[str, Any]) -> None:
    steps, computed = precompute(changed(graded, training_data={"rewards": "given"}))
    assert "annotate offline completions" not in computed
    table = data_of(steps).table.to_pylist()
    assert {row["reward"] for row in table if not row["in_pool"]} <= {n / 4 for n in range(12)}


def test_export_and_explain_know_the_source_of_each_row(graded: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    steps, _ = precompute(changed(graded))
    out = tmp_path / "out"
    export(steps.workspace, out)
    rows = pq.read_table(out / "training_set" / "train.parquet").to_pylist()
    own = steps.first.own
    assert own is not None
    for row in rows:
        source = steps.first.rewards if row["in_pool"] else own
        (text,) = source.completions.read([(row["prompt_id"], row["sample_index"])])["text"].to_pylist()
        assert row["text"] == text
    completions = pq.read_table(out / "completions" / "train.parquet")
    assert set(completions["source"].to_pylist()) == {"references", "offline"}
    given = next(row for row in rows if not row["in_pool"])
    (found,) = explain(steps.workspace, f"{given['prompt_id']}:{given['sample_index']}")["draws"]
    assert found["name"] == "offline"
    assert found["targets"]["target"] == given["target"]
    assert found["logprobs"] == [
        {"step": "score reference log-probs, offline", "logprob": given["ref_logprob"]}
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training_data": {"count": 2}}, "training_data.count does not belong to mode 'mixed'"),
        ({"training_data": {"references": "offline"}}, "training_data.references does not belong"),
        ({"training_data": {"reference_logprobs": "sampler"}}, "reference_logprobs does not belong"),
        ({"rounds": {"count": 2}}, "not with mode 'mixed'"),
        (
            {"prompts": {"completion_fields": [], "completion_reward_field": None}},
            "mode 'mixed' needs prompts.",
        ),
    ],
)
def test_what_it_does_not_take(graded: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(graded, **sections)


def test_keys_of_the_other_modes_know_nothing_of_it(graded: dict[str, Any]) -> None:
    def keys(experiment: Experiment) -> list[str]:
        first = precompute(experiment)[0].first
        return sorted({*first.quantiles_recipe.inputs, *first.training_set_recipe.inputs})

    for data in ({"mode": "random"}, {"mode": "offline"}):
        assert keys(changed(graded | {"training_data": data})) == [
            "logprobs",
            "prompts",
            "quantiles",
            "references",
            "rewards",
        ]
