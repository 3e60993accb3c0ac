"""A judge that is away for part of a run: what the next runs ask it, and what is made of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from qrpo_core.errors import ObjectiveError
from qrpo_core.explain import explain
from qrpo_core.plan import plan
from qrpo_core.steps import prompts
from qrpo_core.steps.chain import Chain, stored_chain
from qrpo_core.steps.workspace import Workspace
from tests.core.rewards.judge_server import Judge, Reply, said


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


def prepare(steps: Any, settings: dict[str, Any]) -> tuple[Chain, dict[str, int]]:
    """One run before training, of its own; as `tasks.rounds.prepare` does it."""
    workspace = Workspace(steps.changed(settings))
    prompts.build(workspace, prompts.recipe(workspace))
    round_ = stored_chain(workspace).first
    computed = {step.label: steps.fill(workspace, step) for step in round_.row_steps}
    round_ = round_.renamed()
    round_.build_quantiles()
    computed[round_.logprobs.label] = steps.fill(workspace, round_.logprobs)
    round_.build_training_set()
    return stored_chain(Workspace(steps.changed(settings))), computed


def training_questions(steps: Any, settings: dict[str, Any]) -> list[str]:
    workspace = Workspace(steps.changed(settings))
    prompts.build(workspace, prompts.recipe(workspace))
    rows = stored_chain(workspace).first.rewards.completions.prompts["messages"].to_pylist()
    return [turns[-1]["content"] for turns in rows]


def test_the_next_run_asks_only_the_rows_that_failed(
    steps: Any, judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    questions = training_questions(steps, judged)
    judge.away = set(questions[:2])
    first, computed = prepare(steps, judged)
    assert computed["score references"] == 3 * len(questions)
    assert judge.answered.total() == 3 * (len(questions) - 2)
    status = Counter(first.first.rewards.read()["status"].to_pylist())
    assert status == {"ok": 3 * (len(questions) - 2), "endpoint_error": 6}

    stages = {each.stage: each for each in plan(Workspace(steps.changed(judged)))}
    assert stages["score references"].missing == 6
    assert stages["score references"].why == "tried again: 6 rows with endpoint_error"
    assert (stages["quantiles"].missing, stages["training set"].missing) == (1, 1)
    assert stages["sample references"].missing == 0

    judge.away, asked = set(), Counter(judge.asked)
    second, computed = prepare(steps, judged)
    assert computed == {"sample references": 0, "score references": 6, "reference log-probs": 6}
    again = judge.asked - asked
    assert again.total() == 6
    assert all(any(f"<{each}>" in text for each in questions[:2]) for text in again)
    table = second.first.rewards.read()
    assert set(table["status"].to_pylist()) == {"ok"}
    assert len(table) == judge.answered.total() == 3 * len(questions)  # none scored twice, none lost
    # What was made of the rewards is made anew, under another name.
    get = second.workspace.artifacts.get
    assert second.first.quantiles.key != first.first.quantiles.key
    assert get(second.first.quantiles).facts["rows"] == len(table)
    assert get(first.first.quantiles).facts["rows"] == len(table) - 6

    third, computed = prepare(steps, judged)
    assert set(computed.values()) == {0}
    assert (judge.asked - asked).total() == 6
    assert third.first.quantiles == second.first.quantiles


def test_rows_that_stay_away_are_left_alone_after_their_tries(
    steps: Any, judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    judge.away = set(training_questions(steps, judged)[:1])
    judged["store"] |= {"tries": 2}
    names = [prepare(steps, judged)[0].first.quantiles for _ in range(3)]
    assert names[0] == names[1] == names[2]  # as long as nothing changes, what is made of them stays
    (stage,) = (each for each in plan(Workspace(steps.changed(judged))) if each.stage == "score references")
    assert stage.missing == 0
    assert stage.why == "left without a reward after store.tries: 3 rows with endpoint_error"
    before = judge.asked.total()
    prepare(steps, judged)
    assert judge.asked.total() == before
    judged["store"]["tries"] = 3
    judge.away.clear()
    assert prepare(steps, judged)[1]["score references"] == 3
    assert judge.answered.total() == 3 * len(training_questions(steps, judged))


def test_a_message_that_rows_are_lacking_says_why(
    steps: Any, judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    service[0].away = set(training_questions(steps, judged))
    with pytest.raises(ObjectiveError, match=r"endpoint_error .*503.*overloaded"):
        prepare(steps, judged)


def test_explain_names_the_results_of_all_prompts(
    steps: Any, judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    judge.away = set(training_questions(steps, judged)[:1])
    chain, _ = prepare(steps, judged)
    table = chain.first.rewards.read().to_pylist()
    away = next(row["prompt_id"] for row in table if row["status"] == "endpoint_error")
    for prompt in (away, next(row["prompt_id"] for row in table if row["status"] == "ok")):
        (section,) = explain(Workspace(steps.changed(judged)), f"{prompt}:0")["draws"]
        made = {each["step"]: each for each in section["artifacts"]}
        assert made["quantiles"]["recipe"] == chain.first.quantiles.key
        assert made["quantiles"]["created"] is not None


def test_the_evaluation_is_named_by_what_may_still_pass(
    steps: Any, judged: dict[str, Any], service: tuple[Service, str]
) -> None:
    judge, _ = service
    prepare(steps, judged)
    workspace = Workspace(steps.changed(judged))
    before = stored_chain(workspace).before
    questions = [turns[-1]["content"] for turns in before.samples.prompts["messages"].to_pylist()]
    judge.away = set(questions[:1])
    for step in before:
        steps.fill(workspace, step)
    lacking = before.rewards.unsettled
    assert lacking
    assert "endpoint_error" in before.rewards.read()["status"].to_pylist()
    judge.away.clear()
    again = stored_chain(Workspace(steps.changed(judged))).before
    for step in again:
        steps.fill(again.rewards.completions.workspace, step)
    assert again.rewards.unsettled == ""
    # Held-out rows that failed never made the training data another.
    names = [stored_chain(each).first.quantiles for each in (workspace, Workspace(steps.changed(judged)))]
    assert names[0] == names[1]
