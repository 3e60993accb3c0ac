"""The tables of docs/concepts/which.md on a real model, made of study.py's results.

    python benchmarks/study/real_model/tables.py

writes them anew, each between its two comments. They are those that `qrpo compare` prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[2])]

from _lab_results import table, with_tables  # noqa: E402
from _result import ROOT  # noqa: E402

from qrpo_core.evaluation.comparison_results import ComparisonResult  # noqa: E402
from qrpo_core.reporting.comparison_text import comparison_rows, ordered  # noqa: E402

PAGE = ROOT / "docs" / "concepts" / "which.md"
RESULTS = ROOT / "benchmarks" / "results" / "study"


def read(name: str) -> dict[str, Any]:
    """A result file, such as that of an entry of study.py."""
    found: dict[str, Any] = json.loads((RESULTS / f"real_model_{name}.json").read_text(encoding="utf-8"))
    return found


def result(entry: str) -> ComparisonResult:
    """The comparison of an entry of study.py."""
    return ComparisonResult.from_dict(read(entry)["result"])


def kind(variant: str) -> str:
    """The first setting that a variant's name gives."""
    return variant.split(",")[0]


def gains(entry: str) -> str:
    """Every variant: gains by each scorer, KL and lengths."""
    head, *rows = comparison_rows(result(entry))
    return table(head, rows)


def differences(entry: str) -> str:
    """What each variant gained more by the reward than each other one; bold where it is resolved."""
    found = result(entry)
    order = ordered(found)
    pairs = {each.names: each for each in found.scorers[0].pairs}
    rows = []
    for place, first in enumerate(order[:-1]):
        cells = [""] * place
        for second in order[place + 1 :]:
            forwards = (first, second) in pairs
            pair = pairs[(first, second) if forwards else (second, first)]
            value = pair.difference.value if forwards else -pair.difference.value
            cells.append(f"**{value:+.3f}**" if pair.resolved else f"{value:+.3f}")
        rows.append([kind(first), *cells])
    return table(["", *(f"over {kind(name)}" for name in order[1:])], rows)


def tried(source: str) -> str:
    """By objective and learning rate, the gain in reward at the KL of each beta, the largest beta first."""
    cells: dict[tuple[str, float], list[str]] = {}
    for row in sorted(read(source)["rows"], key=lambda each: -(each["beta"] or 0)):
        beta = "" if row["kind"] == "sft" else f"beta {row['beta']:g}: "
        cell = f"{beta}{row['gains']['reward'][0]:+.3f} at {row['kl']:.2f}"
        cells.setdefault((row["kind"], row["learning_rate"]), []).append(cell)
    rows = [[name, f"{rate:g}", "; ".join(found)] for (name, rate), found in sorted(cells.items())]
    return table(["objective", "learning rate", "gain in reward at KL, nats"], rows)


KINDS: dict[str, Callable[[str], str]] = {
    "gains": gains,
    "differences": differences,
    "tried": tried,
}


def rendered(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, "real model", lambda entry, kind: KINDS[kind](entry))


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
