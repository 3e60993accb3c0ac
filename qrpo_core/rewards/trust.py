"""What a checked reward pays for, tried on a few prompts before anything is sampled.

A reward that pays the full score for a constant, or for another prompt's answer, teaches that constant; one
that does not pay for the right answer, because the extraction does not find it, teaches nothing. Both are
told here. Looked at are the kinds that have a right answer and cost nothing to ask: number, exact, math,
reasoning_gym and code, alone or as terms of a weighted sum. A reward model, a judge and a function have no
right answer that is known beforehand; sentiment and length have none at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo_core.rewards.base import CheckedReward, RewardRequest, read_json
from qrpo_core.rewards.code_formats import SOLUTIONS
from qrpo_core.rewards.config import RewardConfig

#: What a model writes when it does not answer.
CONSTANTS = ("", "0", "1", "yes", "no", "I'm sorry, but I can't help with that.")

_LOOKED_AT = ("number", "exact", "math", "reasoning_gym", "code")

#: A program that does nothing.
_EMPTY_PROGRAM = "```python\npass\n```"

#: Prompts that are tried; code runs programs, and gets fewer.
_PROMPTS, _CODE_PROMPTS = 16, 4
#: Fewer prompts say nothing: three answers may well be 0.
_FEWEST = 4
#: The share of the prompts on which a constant, or another prompt's answer, has to win.
_WINS = 0.75
#: The share of all prompts on which even a right constant is too much.
_ALWAYS = 0.95
#: The share of prompts whose own answer has to score.
_SCORES = 0.75
_FULL = 1 - 1e-9
_REMEDY = "set reward.extract so that it finds such an answer (null takes the kind's own rule)"


@dataclass(frozen=True, slots=True)
class Doubt:
    """A reason not to trust a reward. severe : whether it stops a run where `trust` is "refuse"."""

    problem: str
    remedy: str
    severe: bool = True


@dataclass(frozen=True, slots=True)
class Tried:
    """What a reward gave on one prompt.

    answer : the right one, None where none is known.
    own, other : what that and another prompt's right answer score; None for those that were not tried, or got
        no score.
    """

    answer: str | None
    own: float | None
    other: float | None
    constants: tuple[float, ...]


def doubts(
    config: RewardConfig, reward: CheckedReward, references: Sequence[tuple[str, str | None]]
) -> list[Doubt]:
    """Every reason not to trust a reward of one of the kinds that are looked at; none for other kinds.

    reward : the reward of `config`. references : (prompt_id, reference) pairs, all of them readable.
    """
    if config.kind not in _LOOKED_AT:
        return []
    chosen = _spread(references, _CODE_PROMPTS if config.kind == "code" else _PROMPTS)
    tried = _try(config, reward, chosen)
    return [*_paid_for_anything(config, tried), *_right_answer_unpaid(config, tried, chosen)]


def terms(config: RewardConfig, place: str = "reward") -> Iterator[tuple[str, RewardConfig]]:
    """A reward, or the scorers that a sum is made of, with their places."""
    if config.kind != "weighted":
        yield place, config
    for number, term in enumerate(config.terms):
        yield from terms(term.reward, f"{place}.terms.{number}.reward")


def _constants(config: RewardConfig) -> tuple[str, ...]:
    return (*CONSTANTS, _EMPTY_PROGRAM) if config.kind == "code" else CONSTANTS


def _spread(references: Sequence[tuple[str, str | None]], count: int) -> list[tuple[str, str]]:
    """So many prompts from all over the set, each reference once where there are enough."""
    different = list({text: (prompt, text) for prompt, text in references if text is not None}.values())
    pool = (
        different if len(different) >= _FEWEST else [(p, text) for p, text in references if text is not None]
    )
    step = max(1, len(pool) // count)
    return pool[::step][:count]


def _try(config: RewardConfig, reward: CheckedReward, chosen: Sequence[tuple[str, str]]) -> list[Tried]:
    requests: list[RewardRequest] = []
    rows: list[tuple[str | None, bool]] = []
    constants = _constants(config)
    for place, (prompt, reference) in enumerate(chosen):
        own, other = (
            _completion(config, _answer(config, text)) for text in (reference, chosen[place - 1][1])
        )
        if other == own:
            other = None
        texts = [*constants, *(text for text in (own, other) if text is not None)]
        rows.append((_answer(config, reference), other is not None))
        requests += [
            RewardRequest(prompt, number, (("user", "?"),), text, reference)
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
        # A constant that is the right answer, as "yes" is of many questions, is no fault of the scorer.
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


def _answer(config: RewardConfig, reference: str) -> str | None:
    """The right answer that a reference gives, as a model would write it; None where none is known."""
    if config.code is not None:
        return _own_program(json.loads(reference), config.code.format)
    value = read_json(reference)
    match config.kind:
        case "reasoning_gym":
            return None if value["entry"]["answer"] is None else str(value["entry"]["answer"])
        case "exact":
            return value if isinstance(value, str) else reference.strip()
    return value.rpartition("####")[2].strip() if isinstance(value, str) else str(value)


def _own_program(row: dict[str, Any], form: str) -> str | None:
    """The data set's own solution, as a completion gives it; None where the row has none."""
    found = (row.get(key) for key in SOLUTIONS)
    text = next((each for each in found if isinstance(each, str) and each.strip()), None)
    if text is None or "```" in text:
        return text
    if form == "humaneval" and not re.search(rf"^def {re.escape(row['entry_point'])}\b", text, re.MULTILINE):
        text = row["prompt"] + text  # the body alone, which continues the prompt
    return f"```python\n{text}\n```"


def _completion(config: RewardConfig, answer: str | None) -> str | None:
    """A completion that gives this answer as the extraction asks for it, behind a line of its own."""
    if answer is None or config.kind == "code" or config.extract == "whole":
        return answer
    if config.kind == "exact" and config.extract is None:
        return answer
    if config.kind == "math" and "\\boxed" not in answer:
        answer = f"So it is $\\boxed{{{answer.strip('$')}}}$."
    if config.extract == "answer_tag":
        answer = f"<answer>{answer}</answer>"
    return f"Let me see.\n{answer}"
