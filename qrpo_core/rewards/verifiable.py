"""Rewards that check a completion against a reference: 1 for right, 0 for wrong, scorers' fractions between.

A completion without an answer (nothing to extract) is a wrong answer: status ok, reward 0.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import Any

from qrpo_core.rewards import extract as reading
from qrpo_core.rewards.answers import stated_expression, stated_expressions, stated_number
from qrpo_core.rewards.base import SCORER_RAISED, RewardRequest, RowReward, Score, clip, read_json
from qrpo_core.rewards.math_answers import for_algebra, is_quantity, is_readable, same_answer
from qrpo_core.rewards.worker import ScorerError, Worker, WorkerDied, WorkerTimeout, shared_worker

#: `math` looks for the answer in the last characters of a completion: math-verify's patterns take
#: quadratic time, about 1 s on the worst 8,000 characters and 20 s on the worst 32,000.
MATH_WINDOW = 8000

#: A longer answer is no answer that can be compared.
_LONGEST_ANSWER = 1000

#: What `number` calls equal where no tolerance is set: an absolute difference, and a share of the reference.
_TOLERANCE, _RELATIVE = Decimal("1e-6"), Decimal("1e-3")


class NumberReward(RowReward):
    """1 if the completion's number equals the reference within the tolerance, else 0.

    Reference: a JSON number, or a string that holds exactly one number, or a string whose part behind the
    last `####` does (GSM8K). Numbers are read as in `extract`; differences are exact decimals.

    how : null (default), the number that the completion states as its answer (`answers.stated_number`);
        "last_number", "last_integer"; "last_line" and "answer_tag" take the last number in that part;
        "whole" asks that the completion be a number and nothing else.
    tolerance : largest difference that is equal. None: 1e-6, and at most a thousandth of the reference, so
        that numbers smaller than 1e-6 are told apart.
    """

    _needs_reference = True

    def __init__(self, how: reading.Extract | None = None, tolerance: float | None = None) -> None:
        self._how = how
        # The shortest spelling: a difference of 0.1 is within a tolerance written as 0.1.
        self._tolerance = None if tolerance is None else Decimal(repr(float(tolerance)))

    def check_reference(self, reference: str) -> None:
        _reference_number(reference)

    def score_row(self, request: RewardRequest) -> float:
        found = self._find(request.text)
        if found is None:
            return 0.0
        wanted = _reference_number(request.reference or "")
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
    """1 if the answer and the reference are the same string, else 0.

    Both are brought to Unicode form NFC, outer white space goes, and inner white space becomes one space.
    Case and punctuation count. Reference: a JSON string, or a number, which stands for its JSON spelling.
    """

    _needs_reference = True

    def __init__(self, how: reading.Extract | None = None) -> None:
        self._how: reading.Extract = how or "whole"

    def check_reference(self, reference: str) -> None:
        _reference_string(reference)

    def score_row(self, request: RewardRequest) -> float:
        answer = reading.extract(request.text, self._how)
        if answer is None:
            return 0.0
        return 1.0 if plain_string(answer) == _reference_string(request.reference or "") else 0.0


class ReasoningGymReward(RowReward):
    """The score that reasoning-gym's own scorer gives the extracted answer (0 to 1, partial ones included).

    how : as `extract.extract`; null (default) takes what stands in the last `<answer>` tag, or without one as
        many last lines as the entry's own answer has, a fence around them left out.

    Reference: a JSON object {"task", "parameters", "entry": {question, answer, metadata}}. An entry whose
    own answer does not score 1 is refused: its metadata did not survive JSON (tasks arc_agi and rearc).

    Some of its scorers evaluate the answer as a Python expression. All of them run in a `Worker`: another
    process, without this one's environment, with limits on time and memory. That is not a sandbox.
    """

    _needs_reference = True

    def __init__(self, how: reading.Extract | None = None) -> None:
        self._how = how
        self._worker = shared_worker("reasoning_gym")

    def check_reference(self, reference: str) -> None:
        value = read_json(reference)
        if not _is_entry(value):
            raise ValueError(
                'an object {"task", "parameters", "entry": {"question", "answer", "metadata"}} is needed'
            )
        _check_with(self._worker, reference)

    def score_row(self, request: RewardRequest) -> float | Score:
        reference = request.reference or ""
        if self._how is None:
            answer = reading.extract(request.text, "answer_tag") or _last_lines(request.text, reference)
        else:
            answer = reading.extract(request.text, self._how)
        if answer is None:
            return 0.0
        return _score_with(self._worker, reference, answer)


class MathReward(RowReward):
    """1 if the completion's answer is the reference, else 0.

    Reference: a JSON number, or a string that is LaTeX or plain mathematics, words, or a text that states an
    answer (`answers.stated_expression`); behind `####` where it has that. Completion and reference are read
    by the same rules. `math_answers` compares what it can compare exactly: plain numbers, times, words, lists
    of them. Everything else is math-verify's to decide, whose numeric comparison is replaced by an exact one
    (`worker_main`). A completion is read from its last `MATH_WINDOW` characters (from the first white space
    on, so that no expression starts in its middle).

    math-verify's own time limits work in a main thread only and not against one long operation in C;
    here it runs in a `Worker` with limits of its own. A row that meets one has status `timeout`.
    """

    _needs_reference = True

    def __init__(self) -> None:
        self._worker = shared_worker("math")
        self._wanted = lru_cache(maxsize=4096)(_reference_answer)

    def check_reference(self, reference: str) -> None:
        wanted = self._wanted(reference)
        if not is_readable(wanted):
            _check_with(self._worker, for_algebra(wanted))

    def score_row(self, request: RewardRequest) -> float | Score:
        wanted = self._wanted(request.reference or "")
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
        """1 or 0 for an answer, or for a text that states none and is read by math-verify."""
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
    """The end of a completion that `math` reads, at most MATH_WINDOW characters."""
    if len(text) <= MATH_WINDOW:
        return text
    tail = text[-MATH_WINDOW:]
    parts = tail.split(maxsplit=1)
    return parts[1] if len(parts) == 2 and not tail[0].isspace() else tail


def plain_string(text: str) -> str:
    """Unicode form NFC, outer white space gone, inner white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _reference_number(reference: str) -> reading.Number:
    value = read_json(reference)
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


def _reference_answer(reference: str) -> str:
    """The answer that a reference of `math` gives. Raises ValueError, saying what is needed."""
    value = read_json(reference)
    if isinstance(value, Decimal):
        return f"{value:f}" if abs(value.adjusted()) < 1000 else str(value)
    if not isinstance(value, str):
        raise ValueError("a number, or a string that holds an expression, is needed")
    text = value.rpartition("####")[2].strip()
    answer = stated_expression(text) or text
    if not re.search(r"\w", answer) and "\\" not in answer:
        raise ValueError("no expression in it")
    if answer.casefold() in ("n/a", "nan", "null"):
        raise ValueError("it says that there is no answer")
    if len(answer) > _LONGEST_ANSWER:
        raise ValueError(
            f"it has {len(answer)} characters, more than {_LONGEST_ANSWER}: give the answer alone"
        )
    return answer


def _reference_string(reference: str) -> str:
    value = read_json(reference)
    text = plain_string(value) if isinstance(value, str) else reference.strip()
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


def _last_lines(text: str, reference: str) -> str | None:
    """As many last lines of a text as the entry's own answer has."""
    own = read_json(reference)["entry"]["answer"] or ""
    lines = text.rstrip().splitlines()
    if lines and lines[-1].strip().startswith("```"):
        lines.pop()
    answer = "\n".join(lines[-(own.strip().count("\n") + 1) :]).strip()
    return answer or None


def _check_with(worker: Worker, reference: str) -> None:
    try:
        worker.check(reference)
    except (ScorerError, WorkerTimeout, WorkerDied) as error:
        raise ValueError(str(error)) from None


def _score_with(worker: Worker, reference: str, answer: str) -> float | Score:
    try:
        result: Any = worker.score(reference, answer)
    except WorkerTimeout as error:
        return Score(None, "timeout", str(error))
    except ScorerError as error:  # on free text most scorers raise where others say 0
        return Score(0.0, "ok", clip(f"{SCORER_RAISED} {error}"))
    except WorkerDied as error:
        return Score(None, "parse_error", clip(str(error)))
    return float(result)
