"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.common.formatting import duration, size
from qrpo_core.config import Experiment
from qrpo_core.inspection.expected import total
from qrpo_core.inspection.memory import StageMemory
from qrpo_core.inspection.price import Price
from qrpo_core.inspection.space import space_line
from qrpo_core.inspection.stage_plan import StagePlan
from qrpo_core.objective_kinds import make_objective
from qrpo_core.objective_kinds.targets import QuantileObjective
from qrpo_core.reporting.text_table import table

#: The head of a plan's table.
COLUMNS = ("stage", "present", "missing", "tokens", "expected", "why")


def plan_lines(
    stages: Sequence[StagePlan], store: str, price: Price | None = None, free: int | None = None
) -> list[str]:
    """A table of the stages: present and missing rows, tokens, expected time and reasons; and the totals.

    price : of a GPU hour; None shows no cost. free : bytes that are free in the store; None where unknown.
    """
    lines = [f"Store: {store}", "", *table([COLUMNS, *map(plan_row, stages)])]
    return [*lines, "", *total_lines(stages, price, free)]


def total_lines(
    stages: Sequence[StagePlan], price: Price | None = None, free: int | None = None
) -> list[str]:
    """What there is to compute, the expected time with its sources, GPU hours, cost and store size."""
    left = [each for each in stages if each.missing]
    if not left:
        return ["Nothing to compute."]
    count = sum(each.missing for each in left)
    what = f"To compute: {count:,} rows and artifacts in {len(left)} of {len(stages)} stages."
    return [f"{what}{_time(left)}", *cost_lines(left, price, free), *source_lines(left)]


def source_lines(stages: Sequence[StagePlan]) -> list[str]:
    """Where the expected times are from, and which stages have none."""
    by: dict[str, list[str]] = {}
    for each in stages:
        if each.expected is not None and each.expected.seconds >= 1:
            by.setdefault(each.expected.source, []).append(each.stage)
    lines = [f"Expected by {source}: {', '.join(names)}." for source, names in by.items()]
    if unknown := [each.stage for each in stages if each.expected is None]:
        lines.append(f"Not measured (`--probe` measures it): {', '.join(unknown)}.")
    if any(each.expected is not None and each.expected.at_most for each in stages):
        lines.append("No completion has been drawn yet: tokens are counted at sampling.max_new_tokens.")
    return lines


def cost_lines(stages: Sequence[StagePlan], price: Price | None = None, free: int | None = None) -> list[str]:
    """GPU hours with their interval and price, and what is added to the store."""
    found = total(stages)
    hours, low, high = found.gpu_hours
    lines = []
    if hours:
        costs = ""
        if price is not None:
            costs = f", {price.text(hours)} ({price.text(low)} to {price.text(high)})"
        lines.append(f"GPU hours: {_hours(hours)} ({_hours(low)} to {_hours(high)}){costs}.")
    if found.store_bytes:
        lines.append(space_line(found.store_bytes, free))
    return lines


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _time(stages: Sequence[StagePlan]) -> str:
    found = total(stages)
    if not found.seconds[0]:
        return ""
    about, low, high = map(duration, found.seconds)
    text = f" About {about} ({low} to {high})"
    return f"{text}, without {found.unknown} stages of unknown time." if found.unknown else f"{text}."


def memory_lines(memory: Sequence[StageMemory], gpu_memory: int | None) -> list[str]:
    """A table of the memory that the stages to compute need; [] for none that loads a model.

    gpu_memory : bytes of a GPU; None for a machine without one, whose host memory the models take.
    """
    if not memory:
        return []
    rows = [("stage", "memory", "of which")]
    for each in memory:
        parts = ", ".join(f"{what} {size(count)}" for what, count in each.parts.items())
        parts += "" if each.certain else "; as of a Llama of this shape, nothing is refused"
        rows.append((each.stage, size(each.total), parts))
    where = "In host memory (no GPU)" if gpu_memory is None else f"On each GPU ({size(gpu_memory)})"
    return ["", f"{where}:", "", *table(rows)]


def references_line(experiment: Experiment) -> list[str]:
    """How many references a sign of a target needs, beside how many there are; [] for other objectives."""
    from qrpo_core.objective.allocation import SURE, objective_facts
    from qrpo_core.pipeline.ranked import planning_ratio

    if not isinstance(make_objective(experiment.objective), QuantileObjective):
        return []
    ratio, data = planning_ratio(experiment.objective), experiment.training_data
    facts = objective_facts(ratio.transform, ratio.beta)
    have = ""
    if data.references == "sampled":
        fewer = data.pool or 0 if data.mode == "best_worst" else int(data.mode != "offline")
        have = f"; there are {experiment.sampling.references_per_prompt - fewer}"
    quantile = 0.5 * (1.0 + facts.pushed_down)
    return [
        f"References to compare with, for the right sign of a target (probability {SURE:g}, quantile "
        f"{quantile:.3f}): {facts.references_needed:,.0f}{have}."
    ]


def plan_row(stage: StagePlan) -> tuple[str, str, str, str, str, str]:
    """The cells of one stage: name, rows present and missing, tokens, expected time, reason and note."""
    tokens = ""
    if stage.expected is not None and stage.expected.tokens is not None:
        tokens = f"{'≤ ' if stage.expected.at_most else ''}{stage.expected.tokens:,.0f}"
    why = "; ".join(filter(None, (stage.why, stage.note)))
    return stage.stage, f"{stage.present:,}", f"{stage.missing:,}", tokens, _expected(stage), why


def _expected(stage: StagePlan) -> str:
    if not stage.missing:
        return ""
    return "?" if stage.expected is None else duration(stage.expected.seconds)
