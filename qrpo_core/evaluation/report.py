"""The report: one self-contained HTML file that answers "did it work, and may I believe it?".

No script, no request to anywhere: styles and figures are inside the file, and its content policy forbids
the rest. All text that came from a model or a data set is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qrpo_core.errors import DataError
from qrpo_core.evaluation import plots
from qrpo_core.evaluation.examples import EXAMPLE_RULE, pick_examples
from qrpo_core.evaluation.headlines import Headline
from qrpo_core.evaluation.inputs import EvaluationInput, floats
from qrpo_core.evaluation.metrics import EvaluationResult, PromptMeans, prompt_means
from qrpo_core.evaluation.saved import survival_rows
from qrpo_core.evaluation.sections import example, filtered, interval_note, objective_rows, stages, tiles
from qrpo_core.evaluation.summary import outcome, summary_rows
from qrpo_core.records import TRAINING_SET, check_table
from qrpo_core.train.config import ObjectiveConfig
from qrpo_core.train.names import OBJECTIVE_NAMES, loss_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ReportFigure", "ReportInput", "pick_examples", "render_report", "report_figures"]

TRAINING_ROWS = pa.schema(
    [TRAINING_SET.field(name) for name in ("prompt_id", "sample_index", "reward")]
    + [pa.field(name, pa.float64(), False) for name in ("quantile", "target", "log_ratio_target")]
    + [pa.field("num_tokens", pa.int64(), False)]
)


_PAIRS = "the loss falls and levels off, accuracy and margin rise"
#: What the curves of a training that goes well do.
_GOOD_TRAINING = {
    "qrpo": "loss and error fall and level off, the log-ratio moves towards its target",
    "sft": "the loss falls and levels off",
    "dpo": _PAIRS,
    "simpo": _PAIRS,
    "rebel": _PAIRS,
}


@dataclass(frozen=True)
class ReportInput:
    """Everything the report shows; nothing in it is looked up elsewhere.

    experiment : the experiment as plain data, shown as YAML; its `name` and `objective` are in the title.
    evaluation : the comparison of `before` and `after` (schemas EVALUATED and EVALUATED_AFTER); the report
        refuses tables that it was not computed from.
    headlines : what stands under the first line.
    training : prompt_id, sample_index, reward, quantile, target (reward units), log_ratio_target (nats),
        num_tokens; no rows where nothing was trained.
    diagnostics : of the training targets; known keys get a label, others are shown under their own name.
    history : the trainer's log, one dict an entry (step, loss, ...).
    stages : one dict a stage (stage, and any of rows, reused, computed, blocks, seconds, note).
    filtered : one dict a kind (what, count, why); zeros included.
    lineage : artifact name → path or key, package → version.
    examples : dicts as `pick_examples` gives them: prompt, before, after, reward_before, reward_after, and
        where known label, mean_before, mean_after.
    example_rule : how the examples were chosen, a sentence.
    saved : of each round, how much of its training is in the policy that it saved (evaluation/saved.py).
    drawn : how much is in what rewards after training were drawn from; None where that is no copy of it.
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


@dataclass(frozen=True)
class ReportFigure:
    """A figure with its name (letters only), title, and a caption of what good and bad look like."""

    name: str
    title: str
    caption: str
    figure: Figure


def render_report(data: ReportInput) -> str:
    """The report as one HTML file.

    Raises DataError where the evaluation and the tables disagree or a row lacks a key.
    """
    import jinja2
    import yaml
    from markupsafe import Markup

    columns, stage_rows = stages(data.stages)
    # The tables first: what is wrong with a row is said before anything is drawn.
    objective = _objective(data)
    tables = {
        "name": str(data.experiment.get("name", "experiment")),
        "objective_name": OBJECTIVE_NAMES[objective.kind].short,
        "objective_head": "Training targets" if objective.kind == "qrpo" else "Training data",
        "outcome": outcome(data.evaluation),
        "headlines": data.headlines,
        "tiles": tiles(data.evaluation, data.diagnostics, data.saved, data.drawn),
        "summary": [*summary_rows(data.evaluation), *survival_rows(data.saved, data.drawn)],
        "kl_note": data.evaluation.kl.note,
        "interval_note": interval_note(data.evaluation),
        "objective": objective_rows(data.diagnostics, objective.kind),
        "examples": [example(row, place, data.evaluation) for place, row in enumerate(data.examples)],
        "example_rule": data.example_rule,
        "filtered": filtered(data.filtered, data.evaluation),
        "stage_columns": columns,
        "stages": stage_rows,
        "settings": yaml.safe_dump(dict(data.experiment), sort_keys=False, allow_unicode=True, width=100),
        "lineage": [(str(name), str(value)) for name, value in data.lineage.items()],
    }
    drawn = [
        {
            "name": each.name,
            "title": each.title,
            "caption": each.caption,
            "svg": Markup(plots.figure_svg(each.figure, each.name, f"{each.title}. {each.caption}")),
        }
        for each in report_figures(data)
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (files("qrpo_core.evaluation") / "report.html.j2").read_text(encoding="utf-8")
    missing = _missing({each["name"] for each in drawn}, OBJECTIVE_NAMES[objective.kind].short)
    return environment.from_string(template).render(**tables, figures=drawn, missing=missing)


def report_figures(data: ReportInput) -> list[ReportFigure]:
    """The figures that the data allows, in the report's order; `plots.figure_png` makes each a PNG."""
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
            f"Good: {_GOOD_TRAINING[objective.kind]}. Bad: a loss that rises or jumps, a gradient norm that "
            "grows, a log-ratio that falls without end."
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
            "be. Bad: all at zero (no signal), nothing right of it, or most of it far to the right.",
            plots.target_figure(floats(training, "log_ratio_target")),
        ),
    ]


def _compared(data: ReportInput) -> tuple[EvaluationInput, PromptMeans]:
    """The checked tables and their means; refused where the evaluation says otherwise about them."""
    # The sampling settings only word the KL note, which the evaluation already carries.
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
    """What the reader might look for and why it is not here."""
    notes = []
    if "quantiles" not in drawn:
        notes.append(f"No calibrated targets ({objective} has none): no figures of quantiles and targets.")
    if "training" not in drawn:
        notes.append("The training history holds no curve: no figure of the training.")
    return notes
