"""The tables of docs/concepts/which.md on a real model, made of study.py's results.

    python benchmarks/study/real_model/tables.py

writes them anew, each between its two comments. They are those that `qrpo compare` prints.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from _result import ROOT  # noqa: E402

from qrpo_core.evaluation.comparison_results import ComparisonResult  # noqa: E402
from qrpo_core.reporting.comparison_text import choice_rows, comparison_rows, pair_text  # noqa: E402

PAGE = ROOT / "docs" / "concepts" / "which.md"
RESULTS = ROOT / "benchmarks" / "results" / "study"
_TABLE = r"(<!-- real model: (\w+) (\w+) -->\n).*?(<!-- end -->)"


def result(entry: str) -> ComparisonResult:
    """The comparison of an entry of study.py."""
    path = RESULTS / f"real_model_{entry}.json"
    return ComparisonResult.from_dict(json.loads(path.read_text(encoding="utf-8"))["result"])


def gains(found: ComparisonResult) -> str:
    """Every variant: gains by each scorer, KL and lengths."""
    return _table(comparison_rows(found))


def resolved(found: ComparisonResult) -> str:
    """By scorer the differences that are resolved, the largest first."""
    rows = [["measured by", "resolved", "of", "differences"]]
    for scored in found.scorers:
        pairs = sorted(
            (each for each in scored.pairs if each.resolved), key=lambda each: -abs(each.difference.value)
        )
        shown = "; ".join(map(pair_text, pairs)) or "none"
        rows.append([scored.scorer, f"{len(pairs)}", f"{len(scored.pairs)}", shown])
    return _table(rows)


def chosen(found: ComparisonResult) -> str:
    """The setting of each group that did best on the validation prompts, beside the others."""
    return _table(choice_rows(found))


KINDS: dict[str, Callable[[ComparisonResult], str]] = {"gains": gains, "resolved": resolved, "chosen": chosen}


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *others])


def rendered(text: str) -> Iterator[str]:
    """The page in parts, every table made anew."""
    end = 0
    for found in re.finditer(_TABLE, text, re.S):
        yield text[end : found.start()]
        yield f"{found[1]}\n{KINDS[found[3]](result(found[2]))}\n\n{found[4]}"
        end = found.end()
    yield text[end:]


if __name__ == "__main__":
    PAGE.write_text("".join(rendered(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
