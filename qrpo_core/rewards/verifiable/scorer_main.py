"""The program of the scoring process: JSON lines on standard input, JSON lines on standard output.

`scorer_process` runs it as a script; it imports nothing of this project. A request is {"kind", "do": "check"
or "score", "ground_truth", "answer"}, a reply is {"value": number or null} or {"error": "Type: message"}.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import Any

#: Processor time of one row. The system ends the process at the next whole second.
CPU_SECONDS = 5
#: Wall-clock time of one row: it ends a scorer that waits instead of computing.
WALL_SECONDS = 30
#: Address space of the process; a scorer that needs more gets MemoryError.
MEMORY_BYTES = 4 << 30

#: math-verify's own comparison of numbers, kept when it is replaced.
_LIBRARY_NUMERIC_EQ: list[Callable[[Any, Any, int, int], bool]] = []


def main() -> None:
    """Answer requests until standard input ends."""
    # Requests and replies get descriptors of their own: what a scorer prints would be read as a reply,
    # and one that calls input() would take the next request.
    requests = os.fdopen(os.dup(0), encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then closes the pipe
    logging.disable(logging.CRITICAL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    for line in requests:
        print(json.dumps(_reply(json.loads(line))), file=replies, flush=True)


def _reply(request: dict[str, str]) -> dict[str, Any]:
    try:
        check, score = _scorer(request["kind"])
        used = resource.getrusage(resource.RUSAGE_SELF)
        # No handlers: some scorers swallow every exception, and a long operation in C runs none.
        # At these limits the system ends the process.
        signal.alarm(WALL_SECONDS)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS)
        if request["do"] == "check":
            check(request["ground_truth"])
            return {"value": None}
        return {"value": float(score(request["ground_truth"], request["answer"]))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.alarm(0)


def _limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


@lru_cache
def _scorer(kind: str) -> tuple[Callable[[str], object], Callable[[str, str], float]]:
    if kind == "math":
        from math_verify import grader

        if not _LIBRARY_NUMERIC_EQ:
            _LIBRARY_NUMERIC_EQ.append(grader.sympy_numeric_eq)
            grader.sympy_numeric_eq = _exact_numeric_eq
        return _gold, _math_score
    import reasoning_gym  # noqa: F401

    return _check_entry, _entry_score


@lru_cache(maxsize=4096)
def _gold(ground_truth: str) -> list[Any]:
    """Return math-verify's expressions of a ground truth in LaTeX. Raises ValueError if it finds none."""
    from math_verify import parse

    found = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=None, raise_on_error=True)
    if all(isinstance(expression, str) for expression in found):
        raise ValueError("math-verify finds no expression in it")
    return list(found)


def _math_score(ground_truth: str, text: str) -> float:
    from math_verify import parse, verify

    gold = _gold(ground_truth)
    found = parse(text, parsing_timeout=None, raise_on_error=True)
    failed: Exception | None = None
    for wanted in gold:
        for candidate in found:
            # One pair at a time: a pair that cannot be compared must not hide another that is equal,
            # and must not count as unequal in silence either.
            try:
                if verify(wanted, candidate, timeout_seconds=None, raise_on_error=True):
                    return 1.0
                if _equal_functions(wanted, candidate):
                    return 1.0
            except Exception as error:
                failed = error
    if failed is not None:
        raise failed
    return 0.0


def _exact_numeric_eq(one: Any, two: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Compare two numbers, in place of math-verify's comparison, which ignores differences below 5e-7.

    Numbers without decimals are equal if they agree in 50 digits. Numbers with decimals are equal if they
    differ by at most 1e-6, both absolutely and relative to the larger.
    """
    import sympy  # type: ignore[import-untyped]
    from math_verify import grader

    matrices = any(isinstance(each, sympy.MatrixBase | sympy.MatrixExpr) for each in (one, two))
    if matrices or any(grader.get_pct_val(each) is not None for each in (one, two)):
        return bool(_LIBRARY_NUMERIC_EQ[0](one, two, float_rounding, numeric_precision))
    one, two = grader.safe_sympy_doit(one), grader.safe_sympy_doit(two)
    if one == two:
        return True
    if one.free_symbols or two.free_symbols:
        return False
    left, right = one.evalf(60), two.evalf(60)
    gap, size = abs(left - right), max(abs(left), abs(right))
    if not (gap.is_number and gap.is_finite):
        return False
    if one.has(sympy.Float) or two.has(sympy.Float):
        return bool(gap <= 1e-6 and gap <= size * sympy.Float("1e-6", 60))
    return bool(gap <= size * sympy.Float("1e-50", 60))


def _equal_functions(one: Any, two: Any) -> bool:
    """Whether two expressions in the same variables agree at eight points, wherever both are real.

    So sqrt(1/n) equals 1/sqrt(n), although they differ for complex n, and |x| does not equal x.
    """
    import sympy

    if not all(isinstance(each, sympy.Expr) for each in (one, two)):
        return False
    names, others = (sorted(each.free_symbols, key=str) for each in (one, two))
    if not names or len(names) > 4 or list(map(str, names)) != list(map(str, others)):
        return False
    agreed = 0
    for shift in range(1, 9):
        places = [sympy.Rational(7 * shift + 3 * k, 5 + k) * (-1) ** (shift >> k) for k in range(len(names))]
        left = one.subs(list(zip(names, places, strict=True))).evalf(30)
        right = two.subs(list(zip(others, places, strict=True))).evalf(30)
        if not (left.is_number and right.is_number) or left.is_real is not right.is_real:
            return False
        if left.is_real:
            if abs(left - right) > abs(left) * sympy.Float("1e-20", 30):
                return False
            agreed += 1
    return agreed >= 3


def _read_entry(ground_truth: str) -> tuple[Any, dict[str, Any]]:
    value = json.loads(ground_truth)
    return _dataset(value["task"], json.dumps(value["parameters"])), value["entry"]


@lru_cache(maxsize=64)
def _dataset(task: str, parameters: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **json.loads(parameters))


def _entry_score(ground_truth: str, answer: str) -> float:
    # Read anew for every row: a scorer may change the entry it is given.
    dataset, entry = _read_entry(ground_truth)
    return float(dataset.score_answer(answer, entry))


def _check_entry(ground_truth: str) -> None:
    dataset, entry = _read_entry(ground_truth)
    answer = entry["answer"]
    if answer is None:  # tasks with many right answers give none
        return
    score = dataset.score_answer(answer, entry)
    if not score >= 1 - 1e-9:
        raise ValueError(
            f"reasoning-gym gives the entry's own answer {score} instead of 1; "
            "its metadata did not survive JSON, or the parameters differ from those it was made with"
        )


if __name__ == "__main__":
    main()
