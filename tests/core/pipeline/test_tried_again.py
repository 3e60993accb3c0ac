"""A judge that is away for part of a run: what the next runs ask it, and what is made of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.inspection.explain import explain
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.core.rewards.judge_server import Judge, Reply, said
from tests.core.small_experiment import changed, fill


class Service:
    """A judge behind a real server, away for the questions in `away`; it counts what it answered with 200."""

    def __init__(self) -> None:
        self.away: set[str] = set()
        self.answered: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def answer(self, body: dict[str, Any], _: int) -> Reply:
        text = body["messages"][-1]["content"]
        self.asked[text] += 1
        if any(f"<{question}>" in text for question in self.away):
            return 503, {}, {"error": {"message": "overloaded"}}
        self.answered[text] += 1
        return said(str(1 + len(text) % 9))


@pytest.fixture
def service() -> Iterator[tuple[Service, str]]:
    found = Service()
    with Judge(found.answer).running() as judge:
        yield found, judge.url


@pytest.fixture
def judged(settings: dict[str, Any], service: tuple[Service, str]) -> dict[str, Any]:
    judge = {
        "url": service[1],
        "model": "judge",
        "template": "<{{ prompt }}> {{ completion }}",
        "expected": False,
        "retry_seconds": 0.0,
        "concurrency": 2,
    }
    return {**settings, "reward": {"kind": "judge", "judge": judge}}


def prepare(settings: dict[str, Any]) -> tuple[ExperimentSteps, dict[str, int]]:
    """One run before training, of its own; as `tasks.rounds.prepare` does it."""
    workspace = Workspace(changed(settings))
    prompts.build(workspace, prompts.recipe(workspace))
    round_ = stored_steps(workspace).first
    computed = {step.label: fill(workspace, step) for step in round_.row_steps}
    round_ = round_.with_current_rewards()
    round_.build_quantiles()
    computed[round_.logprobs.label] = fill(workspace, round_.logprobs)
    round_.build_training_set()
    return stored_steps(Workspace(changed(settings))), computed


def training_questions(settings: dict[str, Any]) -> list[str]:
    workspace = Workspace(changed(settings))
    prompts.build(workspace, prompts.recipe(workspace))
    rows = stored_steps(workspace).first.rewards.completions.prompts["messages"].to_pylist()
    return [turns[-1]["content"] for turns in rows]


def test_the_next_run_asks_only_the_rows_that_failed(
    judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    questions = training_questions(judged)
    judge.away = set(questions[:2])
    first, computed = prepare(judged)
    assert computed["annotate references"] == 3 * len(questions)
    assert judge.answered.total() == 3 * (len(questions) - 2)
    status = Counter(first.first.rewards.read()["status"].to_pylist())
    assert status == {"ok": 3 * (len(questions) - 2), "endpoint_error": 6}

    stages = {each.stage: each for each in plan(Workspace(changed(judged)))}
    assert stages["annotate references"].missing == 6
    assert stages["annotate references"].why == "tried again: 6 rows with endpoint_error"
    assert (stages["compute quantiles"].missing, stages["assemble training set"].missing) == (1, 1)
    assert stages["sample references"].missing == 0

    judge.away, asked = set(), Counter(judge.asked)
    second, computed = prepare(judged)
    assert computed == {"sample references": 0, "annotate references": 6, "score reference log-probs": 6}
    again = judge.asked - asked
    assert again.total() == 6
    assert all(any(f"<{each}>" in text for each in questions[:2]) for text in again)
    table = second.first.rewards.read()
    assert set(table["status"].to_pylist()) == {"ok"}
    assert len(table) == judge.answered.total() == 3 * len(questions)  # none scored twice, none lost
    # What was made of the rewards is made anew, under another name.
    get = second.workspace.artifacts.get
    assert second.first.quantiles_recipe.key != first.first.quantiles_recipe.key
    assert get(second.first.quantiles_recipe).facts["rows"] == len(table)
    assert get(first.first.quantiles_recipe).facts["rows"] == len(table) - 6

    third, computed = prepare(judged)
    assert set(computed.values()) == {0}
    assert (judge.asked - asked).total() == 6
    assert third.first.quantiles_recipe == second.first.quantiles_recipe


def test_rows_that_stay_away_are_left_alone_after_their_tries(
    judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    judge.away = set(training_questions(judged)[:1])
    judged["store"] |= {"tries": 2}
    names = [prepare(judged)[0].first.quantiles_recipe for _ in range(3)]
    assert names[0] == names[1] == names[2]  # as long as nothing changes, what is made of them stays
    (stage,) = (each for each in plan(Workspace(changed(judged))) if each.stage == "annotate references")
    assert stage.missing == 0
    assert stage.why == "left without a reward after store.tries: 3 rows with endpoint_error"
    before = judge.asked.total()
    prepare(judged)
    assert judge.asked.total() == before
    judged["store"]["tries"] = 3
    judge.away.clear()
    assert prepare(judged)[1]["annotate references"] == 3
    assert judge.answered.total() == 3 * len(training_questions(judged))


def test_a_message_that_rows_are_lacking_says_why(
    judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    service[0].away = set(training_questions(judged))
    with pytest.raises(ObjectiveError, match=r"endpoint_error .*503.*overloaded"):
        prepare(judged)


def test_explain_names_the_results_of_all_prompts(
    judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    judge.away = set(training_questions(judged)[:1])
    steps, _ = prepare(judged)
    table = steps.first.rewards.read().to_pylist()
    away = next(row["prompt_id"] for row in table if row["status"] == "endpoint_error")
    for prompt in (away, next(row["prompt_id"] for row in table if row["status"] == "ok")):
        (section,) = explain(Workspace(changed(judged)), f"{prompt}:0")["draws"]
        made = {each["step"]: each for each in section["artifacts"]}
        assert made["quantiles"]["recipe"] == steps.first.quantiles_recipe.key
        assert made["quantiles"]["created"] is not None


def test_the_evaluation_is_named_by_what_may_still_pass(
    judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    prepare(judged)
    workspace = Workspace(changed(judged))
    before = stored_steps(workspace).before
    questions = [turns[-1]["content"] for turns in before.samples.prompts["messages"].to_pylist()]
    judge.away = set(questions[:1])
    for step in before:
        fill(workspace, step)
    lacking = before.rewards.retryable_digest
    assert lacking
    assert "endpoint_error" in before.rewards.read()["status"].to_pylist()
    judge.away.clear()
    again = stored_steps(Workspace(changed(judged))).before
    for step in again:
        fill(again.rewards.completions.workspace, step)
    assert again.rewards.retryable_digest == ""
    # Held-out rows that failed never made the training data another.
    names = [stored_steps(each).first.quantiles_recipe for each in (workspace, Workspace(changed(judged)))]
    assert names[0] == names[1]
