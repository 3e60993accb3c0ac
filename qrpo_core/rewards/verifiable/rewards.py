"""Rewards that check a completion against a ground truth: 1 for right, 0 for wrong, or a fraction.

A completion without an answer (nothing to extract) is a wrong answer: status ok, reward 0.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import Any

from qrpo_core.rewards.base import SCORER_RAISED, RewardRequest, RowReward, Score, clip, read_json
from qrpo_core.rewards.verifiable import extract as reading
from qrpo_core.rewards.verifiable.math_answers import for_algebra, is_quantity, is_readable, same_answer
from qrpo_core.rewards.verifiable.scorer_process import (
    ScorerError,
    Worker,
    WorkerDied,
    WorkerTimeout,
    shared_worker,
)
from qrpo_core.rewards.verifiable.stated_answers import stated_expression, stated_expressions, stated_number

#: Characters at the end of a completion that `math` reads. math-verify's patterns take quadratic time: about
#: 1 s on the worst 8,000 characters and 20 s on the worst 32,000.
MATH_WINDOW = 8000

#: Longest answer that is compared, in characters.
_LONGEST_ANSWER = 1000

#: What `number` calls equal without a tolerance: an absolute difference, and a share of the ground truth.
_TOLERANCE, _RELATIVE = Decimal("1e-6"), Decimal("1e-3")


class NumberReward(RowReward):
    """1 if the completion's number equals the ground truth within the tolerance, else 0.

    Ground truth: a JSON number, or a string that holds exactly one number, or exactly one behind its last
    `####` (GSM8K). `extract` says how numbers are read. Differences are exact decimals.

    how : null (default) takes the number that the completion states as its answer (`stated_number`).
        "last_number" and "last_integer" search the whole text, "last_line" and "answer_tag" take the last
        number of that part, "whole" requires the completion to be a number and nothing else.
    tolerance : largest difference that counts as equal. None means 1e-6, and at most a thousandth of the
        ground truth, so that numbers smaller than 1e-6 are told apart.
    """

    _needs_ground_truth = True

    def __init__(self, how: reading.Extract | None = None, tolerance: float | None = None) -> None:
        self._how = how
        # The shortest spelling: a difference of 0.1 is within a tolerance written as 0.1.
        self._tolerance = None if tolerance is None else Decimal(repr(float(tolerance)))

    def check_ground_truth(self, ground_truth: str) -> None:
        _ground_truth_number(ground_truth)

    def score_row(self, request: RewardRequest) -> float:
        found = self._find(request.text)
        if found is None:
            return 0.0
        wanted = _ground_truth_number(request.ground_truth or "")
        return 1.0 if reading.same_numbers(wanted, found, self._within) else 0.0

    def _within(self, wanted: Decimal, found: Decimal) -> bool:
        tolerance = self._tolerance
        if tolerance is None:
            tolerance = min(_TOLERANCE, reading.ARITHMETIC.multiply(wanted.copy_abs(), _RELATIVE))
        return bool(reading.ARITHMETIC.subtract(found, wanted).copy_abs() <= tolerance)

    def _find(self, text: str) -> reading.Number | None:
        match self._how:
            case None:
                return stated_number(text)
            case "whole":
                return reading.only_number(text)
            case "last_integer":
                return reading.last_integer(text)
            case "last_number":
                return reading.last_number(text)
            case _:
                return reading.last_number(reading.extract(text, self._how) or "")


class ExactReward(RowReward):
    """1 if the answer and the ground truth are the same string, else 0.

    Both are brought to Unicode form NFC; white space is trimmed and folded. Case and punctuation count.
    Ground truth: a JSON string, or a number, which stands for its JSON spelling.
    """

    _needs_ground_truth = True

    def __init__(self, how: reading.Extract | None = None) -> None:
        self._how: reading.Extract = how or "whole"

    def check_ground_truth(self, ground_truth: str) -> None:
        _ground_truth_string(ground_truth)

    def score_row(self, request: RewardRequest) -> float:
        answer = reading.extract(request.text, self._how)
        if answer is None:
            return 0.0
        return 1.0 if plain_string(answer) == _ground_truth_string(request.ground_truth or "") else 0.0


class ReasoningGymReward(RowReward):
    """The score of reasoning-gym's own scorer for the extracted answer, 0 to 1.

    how : see `extract.extract`. null (default) takes the last `<answer>` tag. Without one it takes as many
        last lines as the entry's own answer has, and leaves out a fence around them.

    Ground truth: a JSON object {"task", "parameters", "entry": {question, answer, metadata}}. An entry is
    refused if its own answer does not score 1: JSON has changed its metadata (tasks arc_agi and rearc).

    Some of its scorers evaluate the answer as a Python expression. All of them run in a `Worker`: another
    process without this one's environment, with limits on time and memory. That is not a sandbox.
    """

    _needs_ground_truth = True

    def __init__(self, how: reading.Extract | None = None) -> None:
        self._how = how
        self._worker = shared_worker("reasoning_gym")

    def check_ground_truth(self, ground_truth: str) -> None:
        value = read_json(ground_truth)
        if not _is_entry(value):
            raise ValueError(
                'an object {"task", "parameters", "entry": {"question", "answer", "metadata"}} is needed'
            )
        _check_with(self._worker, ground_truth)

    def score_row(self, request: RewardRequest) -> float | Score:
        ground_truth = request.ground_truth or ""
        if self._how is None:
            answer = reading.extract(request.text, "answer_tag") or _last_lines(request.text, ground_truth)
        else:
            answer = reading.extract(request.text, self._how)
        if answer is None:
            return 0.0
        return _score_with(self._worker, ground_truth, answer)


class MathReward(RowReward):
    """1 if the completion's answer is the ground truth, else 0.

    Ground truth: a JSON number, or a string. A string is LaTeX, plain mathematics, words, or a text that
    states an answer (`stated_expression`); only the part behind its last `####` counts. Completion and ground
    truth are read by the same rules. `math_answers` compares plain numbers, times, words and lists of them
    exactly. math-verify decides everything else; its numeric comparison is replaced by an exact one
    (`scorer_main`). Of a completion the last `MATH_WINDOW` characters are read.

    math-verify's own time limits need a main thread and do not stop one long operation in C. So it runs in a
    `Worker` with its own limits, and a row that exceeds them has status `timeout`.
    """

    _needs_ground_truth = True

    def __init__(self) -> None:
        self._worker = shared_worker("math")
        self._wanted = lru_cache(maxsize=4096)(_ground_truth_answer)

    def check_ground_truth(self, ground_truth: str) -> None:
        wanted = self._wanted(ground_truth)
        if not is_readable(wanted):
            _check_with(self._worker, for_algebra(wanted))

    def score_row(self, request: RewardRequest) -> float | Score:
        wanted = self._wanted(request.ground_truth or "")
        text = math_window(request.text)
        answers = stated_expressions(request.text if _has_box(request.text) else text)
        if not answers and is_quantity(wanted):
            number = stated_number(text)
            answers = [number.spelled if number else text]
        for answer in answers or [text]:
            score = self._compare(wanted, answer, stated=bool(answers))
            if score != 0.0:
                return score
        return 0.0

    def _compare(self, wanted: str, answer: str, *, stated: bool) -> float | Score:
        """Return 1 or 0 for an answer, or for a whole text that states none, which math-verify reads."""
        if not answer.strip() or (stated and len(answer) > _LONGEST_ANSWER):
            return 0.0
        verdict = same_answer(wanted, answer) if len(answer) <= _LONGEST_ANSWER else None
        if verdict is not None:
            return float(verdict)
        text = f"\\boxed{{{for_algebra(answer)}}}" if stated else reading.ascii_numbers(answer)
        return _score_with(self._worker, for_algebra(wanted), text)


def _has_box(text: str) -> bool:
    return "\\boxed" in text or "\\fbox" in text


def math_window(text: str) -> str:
    """Return the end of a completion, at most MATH_WINDOW characters, from the first white space on."""
    if len(text) <= MATH_WINDOW:
        return text
    tail = text[-MATH_WINDOW:]
    parts = tail.split(maxsplit=1)
    return parts[1] if len(parts) == 2 and not tail[0].isspace() else tail


def plain_string(text: str) -> str:
    """Return a text in Unicode form NFC, with white space trimmed and folded."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _ground_truth_number(ground_truth: str) -> reading.Number:
    value = read_json(ground_truth)
    if isinstance(value, Decimal):
        return reading.Number(str(value), value)
    if not isinstance(value, str):
        raise ValueError("a number, or a string that holds one, is needed")
    text = value.rpartition("####")[2]
    found = list(reading.numbers(text))
    if len(found) != 1:
        raise ValueError(
            f"the string holds {len(found)} numbers; it needs exactly one, or one behind its last ####"
        )
    return found[0]


def _ground_truth_answer(ground_truth: str) -> str:
    """Return the answer in a ground truth of `math`. Raises ValueError if it holds none."""
    value = read_json(ground_truth)
    if isinstance(value, Decimal):
        return f"{value:f}" if abs(value.adjusted()) < 1000 else str(value)
    if not isinstance(value, str):
        raise ValueError("a number, or a string that holds an expression, is needed")
    text = value.rpartition("####")[2].strip()
    answer = stated_expression(text) or text
    if not re.search(r"\w", answer) and "\\" not in answer:
        raise ValueError("no expression in it")
    if answer.casefold() in ("n/a", "nan", "null"):
        raise ValueError("it says that it has no answer")
    if len(answer) > _LONGEST_ANSWER:
        raise ValueError(
            f"it has {len(answer)} characters, more than {_LONGEST_ANSWER}: give the answer alone"
        )
    return answer


def _ground_truth_string(ground_truth: str) -> str:
    value = read_json(ground_truth)
    text = plain_string(value) if isinstance(value, str) else ground_truth.strip()
    if not isinstance(value, str | Decimal) or not text:
        raise ValueError("a string that is not empty, or a number, is needed")
    return text


def _is_entry(value: Any) -> bool:
    match value:
        case {
            "task": str(),
            "parameters": dict(),
            "entry": {"question": _, "answer": str() | None, "metadata": dict()},
        }:
            return True
    return False


def _last_lines(text: str, ground_truth: str) -> str | None:
    """Return as many last lines of a text as the entry's own answer has."""
    own = read_json(ground_truth)["entry"]["answer"] or ""
    lines = text.rstrip().splitlines()
    if lines and lines[-1].strip().startswith("```"):
        lines.pop()
    answer = "\n".join(lines[-(own.strip().count("\n") + 1) :]).strip()
    return answer or None


def _check_with(worker: Worker, ground_truth: str) -> None:
    try:
        worker.check(ground_truth)
    except (ScorerError, WorkerTimeout, WorkerDied) as error:
        raise ValueError(str(error)) from None


def _score_with(worker: Worker, ground_truth: str, answer: str) -> float | Score:
    try:
        result: Any = worker.score(ground_truth, answer)
    except WorkerTimeout as error:
        return Score(None, "timeout", str(error))
    except ScorerError as error:  # on free text most scorers raise where others say 0
        return Score(0.0, "ok", clip(f"{SCORER_RAISED} {error}"))
    except WorkerDied as error:
        return Score(None, "parse_error", clip(str(error)))
    return float(result)
