"""Try a reward on a few prompts before anything is sampled, and report reasons not to trust it.

A reward that pays the full score for a constant, or for another prompt's answer, teaches the policy to write
that. A reward that does not pay for the right answer, because the extraction misses it, teaches nothing. The
kinds with a known right answer are tried: number, exact, math, reasoning_gym and code, alone or as terms of a
weighted sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo_core.config.rewards import RewardConfig
from qrpo_core.rewards.base import Reward, RewardRequest, read_json
from qrpo_core.rewards.code.formats import SOLUTIONS

#: Texts that do not answer.
CONSTANTS = ("", "0", "1", "yes", "no", "I'm sorry, but I can't help with that.")

_TRIED_KINDS = ("number", "exact", "math", "reasoning_gym", "code")

#: A program that does nothing.
_EMPTY_PROGRAM = "```python\npass\n```"

#: Number of prompts to try; code runs programs, so it gets fewer.
_PROMPTS, _CODE_PROMPTS = 16, 4
#: With fewer prompts there is no verdict: three answers may all be 0 by chance.
_FEWEST = 4
#: A constant, or another prompt's answer, that gets the full score on this share of the prompts is a doubt.
_WINS = 0.75
#: The same for a constant that may be right.
_ALWAYS = 0.95
#: Share of prompts whose own answer must get the full score.
_SCORES = 0.75
_FULL = 1 - 1e-9
_REMEDY = "set reward.extract so that it finds such an answer (null takes the kind's own rule)"


@dataclass(frozen=True, slots=True)
class Doubt:
    """A reason not to trust a reward. severe : it stops a run if `trust` is "refuse"."""

    problem: str
    remedy: str
    severe: bool = True


@dataclass(frozen=True, slots=True)
class Tried:
    """The scores of a reward on one prompt.

    answer : the right answer; None if it is unknown.
    own, other : score of the right answer and of another prompt's; None if not tried, or without a score.
    constants : scores of `_constants`.
    """

    answer: str | None
    own: float | None
    other: float | None
    constants: tuple[float, ...]


def doubts(
    config: RewardConfig, reward: Reward, ground_truths: Sequence[tuple[str, str | None]]
) -> list[Doubt]:
    """Return every reason not to trust a reward; none for kinds that are not tried.

    reward : the reward of `config`. ground_truths : (prompt_id, ground truth) pairs that the reward can use.
    """
    if config.kind not in _TRIED_KINDS:
        return []
    chosen = _spread(ground_truths, _CODE_PROMPTS if config.kind == "code" else _PROMPTS)
    tried = _try(config, reward, chosen)
    return [*_paid_for_anything(config, tried), *_right_answer_unpaid(config, tried, chosen)]


def terms(config: RewardConfig, place: str = "reward") -> Iterator[tuple[str, RewardConfig]]:
    """Yield a reward with its place, or the terms of a weighted sum with theirs."""
    if config.kind != "weighted":
        yield place, config
    for number, term in enumerate(config.terms):
        yield from terms(term.reward, f"{place}.terms.{number}.reward")


def _constants(config: RewardConfig) -> tuple[str, ...]:
    return (*CONSTANTS, _EMPTY_PROGRAM) if config.kind == "code" else CONSTANTS


def _spread(ground_truths: Sequence[tuple[str, str | None]], count: int) -> list[tuple[str, str]]:
    """Return `count` prompts spread over the set, with distinct ground truths if there are enough."""
    different = list({text: (prompt, text) for prompt, text in ground_truths if text is not None}.values())
    pool = (
        different
        if len(different) >= _FEWEST
        else [(p, text) for p, text in ground_truths if text is not None]
    )
    step = max(1, len(pool) // count)
    return pool[::step][:count]


def _try(config: RewardConfig, reward: Reward, chosen: Sequence[tuple[str, str]]) -> list[Tried]:
    requests: list[RewardRequest] = []
    rows: list[tuple[str | None, bool]] = []
    constants = _constants(config)
    for place, (prompt, ground_truth) in enumerate(chosen):
        own, other = (
            _completion(config, _answer(config, text)) for text in (ground_truth, chosen[place - 1][1])
        )
        if other == own:
            other = None
        texts = [*constants, *(text for text in (own, other) if text is not None)]
        rows.append((_answer(config, ground_truth), other is not None))
        requests += [
            RewardRequest(prompt, number, (("user", "?"),), text, ground_truth)
            for number, text in enumerate(texts)
        ]
    scores = iter(reward.score(requests))
    tried = []
    for answer, has_other in rows:
        for_constants = tuple(_value(next(scores)) for _ in constants)
        own_score = None if answer is None else next(scores).reward
        tried.append(Tried(answer, own_score, next(scores).reward if has_other else None, for_constants))
    return tried


def _value(score: Any) -> float:
    return -1.0 if score.reward is None else float(score.reward)


def _paid_for_anything(config: RewardConfig, tried: Sequence[Tried]) -> Iterator[Doubt]:
    if len(tried) < _FEWEST:
        return
    for number, text in enumerate(_constants(config)):
        paid = [row.constants[number] >= _FULL for row in tried]
        # A constant may be the right answer, as "yes" is of many questions; such prompts do not count.
        unearned = [full for full, row in zip(paid, tried, strict=True) if row.answer != text]
        wrongly = len(unearned) >= _FEWEST and sum(unearned) >= _WINS * len(unearned)
        if wrongly or sum(paid) >= _ALWAYS * len(paid):
            yield Doubt(
                f"it pays the full score for the constant answer {text!r} on {sum(paid)} of {len(paid)} "
                "prompts",
                "a policy would learn to write that; choose another reward or task",
            )
            return
    others = [row.other for row in tried if row.other is not None]
    won = sum(score >= _FULL for score in others)
    if len(others) >= _FEWEST and won >= _WINS * len(others):
        yield Doubt(
            f"it pays the full score for another prompt's answer on {won} of {len(others)} prompts",
            "it does not tell right from wrong; choose another reward or task",
        )


def _right_answer_unpaid(
    config: RewardConfig, tried: Sequence[Tried], chosen: Sequence[tuple[str, str]]
) -> Iterator[Doubt]:
    known = [row.own for row in tried if row.own is not None]
    unpaid = [place for place, row in enumerate(tried) if row.own is not None and row.own < _FULL]
    if config.kind == "reasoning_gym" and tried and all(row.answer is None for row in tried):
        yield Doubt(
            f"task {json.loads(chosen[0][1])['task']!r} has no answer of its own to try the reward with",
            "look at what its scorer accepts before you believe the result",
            severe=False,
        )
    if known and len(known) - len(unpaid) < _SCORES * len(known):
        answer = tried[unpaid[0]].answer or ""
        lines = answer.count("\n") + 1
        form = f" (it has {lines} lines)" if lines > 1 else ""
        how = f"with extract {config.extract!r} " if config.extract else ""
        yield Doubt(
            f"{how}it does not pay for the right answer of {len(unpaid)} of {len(known)} prompts, such as "
            f"{answer[:80]!r}{form}",
            _REMEDY if config.kind != "code" else "look at reward.code: its format, limits and packages",
        )


def _answer(config: RewardConfig, ground_truth: str) -> str | None:
    """Return the right answer in a ground truth, as a model would write it; None if it is unknown."""
    if config.code is not None:
        return _own_program(json.loads(ground_truth), config.code.format)
    value = read_json(ground_truth)
    match config.kind:
        case "reasoning_gym":
            return None if value["entry"]["answer"] is None else str(value["entry"]["answer"])
        case "exact":
            return value if isinstance(value, str) else ground_truth.strip()
    return value.rpartition("####")[2].strip() if isinstance(value, str) else str(value)


def _own_program(row: dict[str, Any], form: str) -> str | None:
    """Return the data set's own solution as a completion; None if the row has none."""
    found = (row.get(key) for key in SOLUTIONS)
    text = next((each for each in found if isinstance(each, str) and each.strip()), None)
    if text is None or "```" in text:
        return text
    if form == "humaneval" and not re.search(rf"^def {re.escape(row['entry_point'])}\b", text, re.MULTILINE):
        text = row["prompt"] + text  # the body alone, which continues the prompt
    return f"```python\n{text}\n```"


def _completion(config: RewardConfig, answer: str | None) -> str | None:
    """Return a completion with this answer in the form that the extraction expects."""
    if answer is None or config.kind == "code" or config.extract == "whole":
        return answer
    if config.kind == "exact" and config.extract is None:
        return answer
    if config.kind == "math" and "\\boxed" not in answer:
        answer = f"So it is $\\boxed{{{answer.strip('$')}}}$."
    if config.extract == "answer_tag":
        answer = f"<answer>{answer}</answer>"
    return f"Let me see.\n{answer}"
