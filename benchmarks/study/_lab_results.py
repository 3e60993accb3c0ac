"""The lab's result files, and what is computed from them: paired intervals, curves over KL, tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _lab_targets import Cell
from _lab_world import Floats
from scipy.interpolate import PchipInterpolator
from scipy.stats import t as student

Measures = dict[str, Floats]
Levels = tuple[float, ...] | Floats


class Results:
    """The cells of every file, by their settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cells: dict[str, Measures] = {}
        for path in sorted(folder.glob("lab_*.json")):
            for each in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                found = {name: np.array(values) for name, values in each["measures"].items()}
                self._cells[json.dumps(each["settings"])] = found

    def __getitem__(self, cell: Cell) -> Measures:
        return self._cells[json.dumps(cell.settings())]

    def reference(self, law: str) -> Measures:
        return self[Cell(law=law, objective="reference", variant="", beta=0.1)]

    def variant(self, variant: str, law: str, beta: float, n: int) -> Measures:
        """The cell of a variant; those that others stand for without ties, and `true`, which needs no n."""
        if law == "continuous" and variant != "true":
            variant = "finite" if variant == "empirical" else variant
            variant = variant if variant == "finite" else "population"
        return self[Cell(law=law, beta=beta, n=8 if variant == "true" else n, variant=variant)]


def interval(values: Floats) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval over seeds."""
    seeds = len(values)
    return float(values.mean()), float(student.ppf(0.975, seeds - 1) * values.std(ddof=1) / np.sqrt(seeds))


def difference(values: Floats, digits: int = 3) -> str:
    """A paired difference with its interval; bold where the interval excludes 0."""
    mean, half = interval(values)
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(page: str, subject: str, made: Callable[..., str]) -> str:
    """The page with every table made anew, each between `<!-- SUBJECT: WORD ... -->` and `<!-- end -->`.

    made : the table of these words.
    """
    places = rf"(<!-- {subject}: ([\w ]+) -->\n).*?(<!-- end -->)"
    return re.sub(
        places, lambda found: f"{found[1]}\n{made(*found[2].split())}\n\n{found[3]}", page, flags=re.S
    )


def at_equal_kl(results: Results, cells: list[Cell], levels: Levels, measure: str = "reward") -> Floats:
    """A measure at each KL level on the curve through the reference policy and the cells, [levels, S].

    levels : [levels], or [levels, S] where each seed has its own. Monotone cubic interpolation in KL, for
    each seed; nan outside the KLs that the seed's trained policies reach.
    """
    found = [results[cell] for cell in cells]
    start = results.reference(cells[0].law)
    kl = np.stack([np.zeros_like(start["kl"]), *(each["kl"] for each in found)])
    value = np.stack([start[measure], *(each[measure] for each in found)])
    given = np.asarray(levels, dtype=np.float64)
    wanted = given if given.ndim == 2 else np.repeat(given[:, None], kl.shape[1], axis=1)
    out = np.empty(wanted.shape)
    for seed in range(kl.shape[1]):
        order = np.argsort(kl[:, seed])
        curve = PchipInterpolator(kl[order, seed], value[order, seed], extrapolate=False)
        reached = wanted[:, seed] >= kl[order[1], seed]  # order[0] is the reference policy
        out[:, seed] = np.where(reached, curve(wanted[:, seed]), np.nan)
    return out


def shown_mean(values: Floats) -> str:
    return "" if np.isnan(values).any() else f"{values.mean():.3f}"


def shown_difference(off: Floats) -> str:
    if np.isnan(off).any():
        return ""
    return "same" if np.ptp(off) == 0 and off[0] == 0 else difference(off)
