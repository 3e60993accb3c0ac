"""`qrpo explain`: every number is the one that the pipeline trains on, and what is not there yet is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from scipy import stats

from qrpo_core.common.schemas import TRAINING_SET
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.explain import explain, explain_lines
from qrpo_core.maintenance.in_use import known_prompts, known_steps, steps_of
from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, reference_steps
from qrpo_core.pipeline.policies import folder_files
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute, prepare
from tests.core.stores import REWARD, fill, of_split

LENGTH = {"reward": REWARD}
SAMPLES = {"references_per_prompt": 6}


def text_of(found: dict[str, Any]) -> str:
    """The explanation in words; its JSON form must be JSON."""
    json.dumps(found, allow_nan=False)
    return "\n".join(explain_lines(found))


def training_row(steps: ExperimentSteps, prompt: str, index: int) -> dict[str, Any]:
    made = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    rows = steps.workspace.load(made, "training_set.parquet", TRAINING_SET).to_pylist()
    (row,) = [row for row in rows if (row["prompt_id"], row["sample_index"]) == (prompt, index)]
    return row


def test_target_quantile_and_interval_by_hand(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings | LENGTH, sampling=SAMPLES, objective={"beta": 0.3}))
    workspace = steps.workspace
    stored: dict[str, list[float]] = {}
    for row in steps.first.rewards.read().to_pylist():
        assert row["sample_index"] == len(stored.setdefault(row["prompt_id"], []))
        stored[row["prompt_id"]].append(row["reward"])
    assert len({reward for rewards in stored.values() for reward in rewards}) > 2
    atoms = {r for rewards in stored.values() for r in rewards if rewards.count(r) > 1}
    for prompt, rewards in stored.items():
        others = [[r for j, r in enumerate(rewards) if j != i] for i in range(6)]
        hits = [sum(other <= rewards[i] for other in others[i]) for i in range(6)]
        # Method 3.7: an atom counts with its quantile among all 6, another reward with its stretch of 1/6.
        upto = [sum(other <= reward for other in rewards) / 6 for reward in rewards]
        stretch = 0.3 * (1 - math.exp(-1 / 6 / 0.3))
        weights = [1 / 6 if reward in atoms else stretch for reward in rewards]
        log_z = math.log(sum(w * math.exp(q / 0.3) for w, q in zip(weights, upto, strict=True)))
        for index in range(6):
            (section,) = explain(workspace, f"{prompt}:{index}")["draws"]
            below = sum(other < rewards[index] for other in others[index])
            assert section["ranks"] == {
                "below": below,
                "equal": hits[index] - below,
                "n": 5,
                "in_pool": True,
                "interval": section["ranks"]["interval"],
            }
            interval = section["ranks"]["interval"]
            lower = stats.beta.ppf(0.025, hits[index], 6 - hits[index]) if hits[index] else 0.0
            upper = stats.beta.ppf(0.975, hits[index] + 1, 5 - hits[index]) if hits[index] < 5 else 1.0
            assert (interval["lower"], interval["upper"]) == pytest.approx((lower, upper), rel=1e-9)
            targets = section["targets"]
            assert targets["quantile"] == pytest.approx(hits[index] / 5)
            assert targets["log_partition"] == pytest.approx(log_z, rel=1e-12)
            assert targets["target"] == pytest.approx(hits[index] / 5 - 0.3 * log_z, abs=1e-12)
            assert targets["log_ratio_target"] == pytest.approx(targets["target"] / 0.3, abs=1e-12)
            assert section["reference_rewards"] == sorted(rewards)
            assert section["reward"]["reward"] == rewards[index]


def test_a_completion_is_shown_with_all_that_made_it(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings | LENGTH, sampling=SAMPLES))
    prompt = of_split(steps.workspace, "train")
    found = explain(steps.workspace, f"{prompt[:8]}:4")
    (section,) = found["draws"]
    row = training_row(steps, prompt, 4)
    assert found["prompt"]["prompt_id"] == prompt
    assert section["completion"]["token_ids"] == row["token_ids"]
    assert section["completion"]["engine"] == "fake"
    assert section["ref_logprob"] == section["logprobs"][0]["logprob"] == row["ref_logprob"]
    assert section["policy"] == steps.reference.digest
    first = steps.first
    recipes = {block["what"]: block["recipe"] for block in section["blocks"]}
    sampled = first.row_steps[0].recipe
    assert recipes == {
        "completion": sampled.key,
        "reward": first.rewards.recipe.key,
        "score reference log-probs": first.logprobs.recipe.key,
    }
    made = {each["step"]: each for each in section["artifacts"]}
    assert made["training_set"]["recipe"] == first.training_set_recipe.key
    assert made["training_set"]["created"].startswith("20")
    assert made["train"] == {"step": "train", "recipe": first.train_recipe.key, "created": None, "code": None}
    text = text_of(found)
    for part in (repr(section["completion"]["text"]), str(section["completion"]["seed"]), sampled.key):
        assert part in text
    assert "train         " in text
    assert "not yet" in text


def test_a_prompt_is_shown_with_every_completion(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings | LENGTH, sampling=SAMPLES))
    prompt = of_split(steps.workspace, "train")
    found = explain(steps.workspace, prompt)
    (section,) = found["draws"]
    assert [row["sample_index"] for row in section["completions"]] == list(range(6))
    for row in section["completions"]:
        (alone,) = explain(steps.workspace, f"{prompt}:{row['sample_index']}")["draws"]
        assert row["target"] == alone["targets"]["target"]
        assert row["reward"] == alone["reward"]["reward"]
        assert row["n"] == 5
    assert found["budget"] == {
        "references": 6,
        "of_every_prompt": 6,
        "of_this_prompt": None,
        "drawn": 6,
        "drawn_beyond": 0,
    }
    assert section["notes"] == []
    assert "log-ratio target" in text_of(found)


def test_what_is_not_there_yet_is_said(settings: dict[str, Any]) -> None:
    workspace = Workspace(changed(settings | LENGTH))
    prompt = of_split(workspace, "train")
    (section,) = explain(workspace, prompt)["draws"]
    assert section["completions"] == []
    assert section["notes"] == ["3 of 3 not drawn yet", "not ranked yet"]
    assert text_of(explain(workspace, f"{prompt}:0")).count("not yet") == 4  # artifacts, the prompts included
    samples, rewards = known_steps(workspace).first.row_steps
    fill(workspace, samples)
    (section,) = explain(workspace, prompt)["draws"]
    assert section["notes"] == ["3 of 3 not scored yet", "not ranked yet"]
    fill(workspace, rewards)
    known_steps(workspace).first.build_quantiles()
    (section,) = explain(workspace, f"{prompt}:0")["draws"]
    assert section["notes"] == ["no training set yet, so no targets"]
    assert section["ranks"]["n"] == 2
    assert section["targets"] is None
    assert section["logprobs"] == [{"step": "score reference log-probs", "logprob": None}]
    text_of(explain(workspace, f"{prompt}:0"))


def offline(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Say {n}", "answer": n, "good": "one two three", "bad": "one"} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    return {
        **settings,
        **LENGTH,
        "prompts": settings["prompts"] | fields,
        "training_data": {"mode": "offline"},
    }


def test_offline_completions_and_their_references(settings: dict[str, Any], tmp_path: Path) -> None:
    steps, _ = precompute(changed(offline(settings, tmp_path)))
    workspace = steps.workspace
    prompt = of_split(workspace, "train")
    references, own = explain(workspace, prompt)["draws"]
    assert [row["sample_index"] for row in references["completions"]] == [0, 1, 2]
    rows = {row["text"]: row for row in own["completions"]}
    assert rows.keys() == {"one", "one two three"}
    assert (rows["one"]["reward"], rows["one two three"]["reward"]) == (0.25, 0.75)
    chosen, rejected = (rows[text]["sample_index"] for text in ("one two three", "one"))
    (section,) = explain(workspace, f"{prompt}:{chosen}")["draws"]
    row = training_row(steps, prompt, chosen)
    assert section["completion"]["token_ids"] == row["token_ids"]
    assert section["policy"] is None
    assert section["pairs"] == [{"prompt_id": prompt, "chosen": chosen, "rejected": rejected}]
    assert [row["label"] for row in section["data_set"]] == ["chosen"]
    drawn = sorted(row["reward"] for row in references["completions"])
    assert section["reference_rewards"] == drawn
    assert section["ranks"]["below"] == sum(reward < 0.75 for reward in drawn)
    assert section["ranks"]["in_pool"] is False
    text = text_of(explain(workspace, f"{prompt}:{chosen}"))
    assert f"{chosen} preferred to {rejected}" in text
    assert "chosen in pair 0" in text
    text_of(explain(workspace, prompt))


def test_a_completion_that_is_not_trained_on_says_why(settings: dict[str, Any]) -> None:
    best = {**settings, **LENGTH, "training_data": {"mode": "best_worst", "pool": 4}}
    steps, _ = precompute(changed(best, sampling=SAMPLES))
    prompt = of_split(steps.workspace, "train")
    sections = [explain(steps.workspace, f"{prompt}:{index}")["draws"][0] for index in range(6)]
    ranked = [section for section in sections if section["ranks"] is not None]
    assert len(ranked) == 2
    assert all(section["ranks"]["n"] == 2 and not section["ranks"]["in_pool"] for section in ranked)
    for section in sections:
        left_out = ["not trained on: training_data.mode 'best_worst'"]
        assert section["notes"] == ([] if section in ranked else left_out)


def test_a_completion_without_a_reward_says_why(settings: dict[str, Any], tmp_path: Path) -> None:
    fields = {"completion_fields": ["answers"], "completion_reward_field": "grade"}
    answers = [{"text": text, "grade": grade} for text, grade in (("a", 1.0), ("b", 0.0), ("c", None))]
    rows = [{"prompt": f"Say {n}", "answers": answers} for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = {
        **settings,
        "prompts": {key: value for key, value in settings["prompts"].items() if key != "ground_truth_field"}
        | fields,
        "training_data": {"mode": "offline", "rewards": "given", "references": "offline"},
    }
    steps, _ = precompute(parse_experiment(graded))
    prompt = of_split(steps.workspace, "train")
    (section,) = explain(steps.workspace, prompt)["draws"]
    rows_by_text = {row["text"]: row for row in section["completions"]}
    assert rows_by_text["c"]["status"] == "parse_error"
    (section,) = explain(steps.workspace, f"{prompt}:{rows_by_text['c']['sample_index']}")["draws"]
    assert section["notes"] == ["status parse_error: in no quantile"]
    assert section["reward"]["detail"] == "the data set gives no reward"
    assert "the data set gives no reward" in text_of(
        explain(steps.workspace, f"{prompt}:{rows_by_text['c']['sample_index']}")
    )


def test_a_baseline_has_pairs_and_no_targets(settings: dict[str, Any]) -> None:
    paired = {**settings, **LENGTH, "training_data": {"mode": "pairs"}}
    steps, _ = precompute(changed(paired, sampling=SAMPLES, objective={"kind": "dpo"}))
    prompt = of_split(steps.workspace, "train")
    sections = [explain(steps.workspace, f"{prompt}:{index}")["draws"][0] for index in range(6)]
    assert all(section["targets"] is None for section in sections)
    assert all("objective 'dpo' has no targets" in section["notes"] for section in sections)
    rewards = [section["reward"]["reward"] for section in sections]
    for index, section in enumerate(sections):
        tied = rewards[index] == rewards[index ^ 1]
        assert [{pair["chosen"], pair["rejected"]} for pair in section["pairs"]] == (
            [] if tied else [{index, index ^ 1}]
        )


def test_every_scorer_and_every_reference_is_shown(settings: dict[str, Any], tmp_path: Path) -> None:
    steps, _ = precompute(changed(settings | LENGTH))
    prompt = of_split(steps.workspace, "train")
    other = {**settings, "reward": {"kind": "number"}}
    precompute(parse_experiment(other))
    file = tmp_path / "questions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"answer": 77}) + "\n" for line in lines))
    steps, _ = precompute(parse_experiment(other))
    (section,) = explain(steps.workspace, f"{prompt}:1")["draws"]
    by_scorer = [(row["scorer"]["config"]["kind"], row["used"]) for row in section["every_reward"]]
    assert sorted(by_scorer) == [("length", False), ("number", True), ("number", True)]
    digests = {row["ground_truth_digest"] for row in section["every_reward"] if row["used"]}
    assert len(digests) == 2
    assert section["reward"]["ground_truth_digest"] in digests
    text = text_of(explain(steps.workspace, f"{prompt}:1"))
    assert text.count("other reward") == 2
    assert [block["what"] for block in section["blocks"]].count("reward") == 1


def test_a_prompts_own_budget_and_rows_beyond_the_experiments(settings: dict[str, Any]) -> None:
    precompute(changed(settings | LENGTH, sampling=SAMPLES))
    workspace = Workspace(changed(settings | LENGTH, sampling={"references_per_prompt": 2}))
    samples, rewards = reference_steps(workspace)
    prompt, other = list(samples.wanted)[:2]
    budgets.write(workspace.objects, samples.recipe, rewards.recipe, {prompt: 4})
    found = explain(workspace, prompt)["budget"]
    assert found["references"] == found["of_this_prompt"] == found["drawn"] == 4
    assert (found["of_every_prompt"], found["drawn_beyond"]) == (2, 2)
    assert explain(workspace, other)["budget"]["drawn_beyond"] == 4
    assert "every prompt 2, this one 4), 4 drawn, 2 more than asked for" in text_of(
        explain(workspace, prompt)
    )


def test_rounds_and_held_out_draws(settings: dict[str, Any], make_tiny_model: Any, tmp_path: Path) -> None:
    asked = changed(settings | LENGTH, rounds={"count": 2, "samples_per_prompt": 2})
    steps, _ = precompute(asked)
    workspace = steps.workspace
    for number in (1, 2):
        round_ = steps.round(number)
        if number == 2:
            prepare(workspace, round_)
        model = make_tiny_model(tmp_path / f"round{number}" / "policy")
        (model / "merges.txt").write_text(f"#{number}")  # not read, but it makes another policy of each
        workspace.artifacts.commit(round_.train_recipe, folder_files(model), {"rows": 1, "steps": 1}, 0.0)
    prompt = of_split(workspace, "train")
    found = explain(workspace, f"{prompt}:1")
    assert [section["name"] for section in found["draws"]] == ["references", "round 2"]
    second = found["draws"][1]
    assert second["policy"] == steps.round(2).start.digest
    assert second["ranks"]["n"] == 3
    steps_of = [made["step"] for made in second["artifacts"]]
    assert steps_of == ["prompts", "train", "quantiles", "training_set", "train"]
    held_out = of_split(workspace, "held_out")
    end = steps.after(steps.round(2))
    for step in (*steps.before, *end.after, *end.divergence):
        fill(workspace, step)
    before, after = explain(workspace, f"{held_out}:0")["draws"]
    assert (before["name"], after["name"]) == ("held-out, before", "held-out, after")
    assert before["reward"]["status"] == after["reward"]["status"] == "ok"
    assert [each["step"] for each in after["logprobs"]] == [
        "score policy log-probs, after",
        "score reference log-probs, after",
    ]
    assert all(each["logprob"] < 0 for each in after["logprobs"])
    assert after["policy"] not in (before["policy"], second["policy"])
    text_of(explain(workspace, held_out))
    text_of(explain(workspace, f"{held_out}:0"))


@pytest.mark.parametrize("mode", ["random", "best_worst", "offline"])
def test_the_chain_of_one_prompt_names_the_results_of_all(
    settings: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    data = {"mode": mode, "pool": 2} if mode == "best_worst" else {"mode": mode}
    base = offline(settings, tmp_path) if mode == "offline" else settings | LENGTH
    workspace = Workspace(
        changed(base, sampling=SAMPLES)
        if mode == "offline"
        else changed(base | {"training_data": data}, sampling=SAMPLES)
    )
    asked, tables = known_prompts(workspace)
    prompt = of_split(workspace, "train")
    only = tables.prompts.filter(pc.equal(tables.prompts["prompt_id"], prompt))
    whole, alone = (
        steps_of(workspace, asked, tables),
        steps_of(workspace, asked, PromptTables(only, tables.offline)),
    )
    for name in ("quantiles_recipe", "training_set_recipe", "train_recipe"):
        assert getattr(alone.first, name) == getattr(whole.first, name)
