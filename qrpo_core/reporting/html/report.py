"""The report: one self-contained HTML file with the result and the evidence for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import TRAINING_SET, check_table
from qrpo_core.config.objective import ObjectiveConfig
from qrpo_core.evaluation.benchmarks import BenchmarkResult
from qrpo_core.evaluation.inputs import EvaluationInput, Floats, floats
from qrpo_core.evaluation.metrics import PromptMeans, prompt_means
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.objective_kinds import KINDS
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.reporting.headlines import Headline
from qrpo_core.reporting.html import plots
from qrpo_core.reporting.html.examples import EXAMPLE_RULE
from qrpo_core.reporting.html.page import ReportFigure, render_page
from qrpo_core.reporting.html.sections import (
    clipped_rows,
    example,
    filtered,
    interval_note,
    objective_rows,
    stages,
    tiles,
)
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES, loss_unit
from qrpo_core.reporting.summary import outcome, summary_rows, survival_rows

TRAINING_ROWS = pa.schema(
    [TRAINING_SET.field(name) for name in ("prompt_id", "sample_index", "reward")]
    + [pa.field(name, pa.float64(), False) for name in ("quantile", "target", "log_ratio_target")]
    + [pa.field("num_tokens", pa.int64(), False)]
)


@dataclass(frozen=True)
class ReportInput:
    """Everything that the report shows.

    experiment : the experiment as plain data, shown as YAML; its `name` and `objective` are in the title.
    evaluation : the comparison of `before` and `after` (schemas EVALUATED and EVALUATED_AFTER); the report
        refuses tables that it was not computed from.
    headlines : warnings and notes under the first line.
    training : prompt_id, sample_index, reward, quantile, target (reward units), log_ratio_target (nats),
        num_tokens; no rows for the baselines.
    diagnostics : of the training targets; known keys have a label, others appear under their own name.
    history : the trainer's log, one dict an entry (step, loss, ...).
    stages : one dict a stage (stage, and any of rows, reused, computed, blocks, seconds, note).
    filtered : one dict a kind (what, count, why); zeros included.
    lineage : artifact name → path or key, package → version.
    examples : dicts as `pick_examples` returns them: prompt, before, after, reward_before, reward_after, and
        optionally label, mean_before, mean_after.
    example_rule : a sentence on the choice of the examples.
    saved : facts of each round's saved policy (`training.survival.LogprobComparison.facts`).
    benchmarks : results by name.
    drawn : the same facts of the engine's copy of the policy; None if there is no copy.
    """

    experiment: Mapping[str, Any]
    evaluation: EvaluationResult
    before: pa.Table
    after: pa.Table
    training: pa.Table
    headlines: Sequence[Headline] = ()
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    filtered: Sequence[Mapping[str, Any]] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)
    examples: Sequence[Mapping[str, Any]] = ()
    example_rule: str = EXAMPLE_RULE
    saved: Sequence[Mapping[str, Any]] = ()
    drawn: Mapping[str, Any] | None = None
    benchmarks: Mapping[str, BenchmarkResult] = field(default_factory=dict)


def render_report(data: ReportInput) -> str:
    """The report as one HTML file.

    Raises DataError if the evaluation and the tables disagree or a row lacks a key.
    """
    import yaml

    columns, stage_rows = stages(data.stages)
    # The tables first: errors in rows come before the slow figures.
    objective = _objective(data)
    tables = {
        "name": str(data.experiment.get("name", "experiment")),
        "objective_name": OBJECTIVE_NAMES[objective.kind].short,
        "objective_head": "Training targets" if objective.has_targets else "Training data",
        "outcome": outcome(data.evaluation),
        "headlines": data.headlines,
        "tiles": tiles(data.evaluation, data.diagnostics, data.saved, data.drawn),
        "summary": [*summary_rows(data.evaluation), *survival_rows(data.saved, data.drawn)],
        "benchmarks": benchmark_rows(data.benchmarks),
        "kl_note": data.evaluation.kl.note,
        "interval_note": interval_note(data.evaluation),
        "objective": [
            *objective_rows(data.diagnostics, has_targets=objective.has_targets),
            *clipped_rows(data.history),
        ],
        "examples": [example(row, place, data.evaluation) for place, row in enumerate(data.examples)],
        "example_rule": data.example_rule,
        "filtered": filtered(data.filtered, data.evaluation),
        "stage_columns": columns,
        "stages": stage_rows,
        "settings": yaml.safe_dump(dict(data.experiment), sort_keys=False, allow_unicode=True, width=100),
        "lineage": [(str(name), str(value)) for name, value in data.lineage.items()],
    }
    drawn = report_figures(data)
    missing = _missing({each.name for each in drawn}, OBJECTIVE_NAMES[objective.kind].short)
    return render_page("report.html.j2", drawn, **tables, missing=missing)


def report_figures(data: ReportInput) -> list[ReportFigure]:
    """The figures that the data allows, in the report's order; `canvas.figure_png` turns each into a PNG."""
    pair, means = _compared(data)
    found = [
        ReportFigure(
            "rewards",
            "Rewards before and after, one count a prompt",
            "Good: the blue outline (after) stands right of the grey (before), and most differences lie "
            "right of zero. Bad: the two coincide, or a few prompts gain while most lose.",
            plots.reward_figure(means, data.evaluation),
        )
    ]
    training = check_table(data.training, TRAINING_ROWS, "report, training")
    if training.num_rows:
        found += _training_set_figures(training, data.diagnostics)
    objective = _objective(data)
    if (curves := plots.training_figure(data.history, loss_unit(objective))) is not None:
        figure, notes = curves
        caption = (
            f"Good: {KINDS[objective.kind].good_training}. Bad: a loss that rises or jumps, a gradient norm "
            "that grows, a log-ratio that falls without end."
        )
        found.append(
            ReportFigure("training", "Training", " ".join([caption, *(f"({n})" for n in notes)]), figure)
        )
    undrawn = sum(sum(side.not_ok.values()) for side in (data.evaluation.before, data.evaluation.after))
    caption = (
        "Every dot a completion, the line the mean over groups of similar length. Good: the cloud moves up. "
        "Bad: it moves sideways, so that the reward was bought with length, or piles up at the length limit."
    )
    if undrawn:
        caption += f" {undrawn:,} completions without a reward are not drawn."
    found.append(ReportFigure("length", "Length and reward", caption, plots.length_figure(pair)))
    return found


def _training_set_figures(training: pa.Table, diagnostics: Mapping[str, Any]) -> list[ReportFigure]:
    each = diagnostics.get("references_per_prompt")
    asked = floats(training, "log_ratio_target")
    steps = int(each) - 1 if each is not None and float(each).is_integer() and each > 1 else None
    return [
        ReportFigure(
            "quantiles",
            "Quantile rewards of the training completions",
            "Good: bars level with the line, which is what rewards without ties give. Bad: tall bars; many "
            "completions of a prompt share a reward, and only a normaliser that counts ties fits them.",
            plots.quantile_figure(floats(training, "quantile"), steps),
        ),
        ReportFigure(
            "targets",
            "What training asks for",
            "Good: completions on both sides of zero; at a small beta most are pushed down, as they should "
            "be. Bad: all at zero (no signal), nothing right of it, or most of it far to the right."
            + _given_up(asked),
            plots.target_figure(asked[np.isfinite(asked)]),
        ),
    ]


def _given_up(asked: Floats) -> str:
    """A sentence on the targets of -inf, which no axis has."""
    count = int(np.isneginf(asked).sum())
    return f" {count:,} more are to be given up (-inf)." if count else ""


def _compared(data: ReportInput) -> tuple[EvaluationInput, PromptMeans]:
    """The checked tables and their means; raises DataError if the evaluation is of other tables."""
    # The sampling settings only change the KL note, which the evaluation already has.
    pair = EvaluationInput(data.before, data.after, temperature=1.0, top_p=1.0)
    means = prompt_means(pair)
    for name, mean, side in (
        ("before", means.before.mean(), data.evaluation.before),
        ("after", means.after.mean(), data.evaluation.after),
    ):
        stated = side.reward.value
        if not math.isclose(mean, stated, rel_tol=1e-9, abs_tol=1e-12):
            raise DataError(
                f"the evaluation states a mean reward {name} of {stated}, the table gives {mean}",
                where="report",
                remedy="pass the tables that were evaluated",
            )
    return pair, means


def _objective(data: ReportInput) -> ObjectiveConfig:
    """The objective that was trained."""
    return ObjectiveConfig.model_validate(data.experiment.get("objective", {}))


def _missing(drawn: set[str], objective: str) -> list[str]:
    """Notes on figures that the report lacks, with the reason."""
    notes = []
    if "quantiles" not in drawn:
        notes.append(f"No calibrated targets ({objective} has none): no figures of quantiles and targets.")
    if "training" not in drawn:
        notes.append("The training history holds no curve: no figure of the training.")
    return notes
