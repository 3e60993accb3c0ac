"""An experiment's plan and result as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrpo_core.config import Experiment
from qrpo_core.evaluation.saved import survival_rows
from qrpo_core.evaluation.summary import normalisation, outcome, summary_rows
from qrpo_core.plan import StagePlan
from qrpo_core.steps.chain import stored_chain
from qrpo_core.steps.evaluation import filtered, result_of, unusable_rows
from qrpo_core.steps.headlines import Finished, headlines
from qrpo_core.steps.rounds import Made
from qrpo_core.steps.usable import LeftOut
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest


def plan_lines(stages: Sequence[StagePlan], store: str) -> list[str]:
    """A table of the stages: what is there, what is missing, its tokens and expected time, and why."""
    rows = [("stage", "present", "missing", "tokens", "expected", "why")]
    rows += [plan_row(each) for each in stages]
    lines = [f"Store: {store}", "", *table(rows)]
    left = [each for each in stages if each.missing]
    if not left:
        return [*lines, "", "Nothing to compute."]
    count = sum(each.missing for each in left)
    known = sum(each.seconds for each in left if each.seconds is not None)
    unknown = sum(each.seconds is None for each in left)
    time = f" About {duration(known)}" if known else ""
    time += (
        f"{' and' if known else ' Time of'} {unknown} stages that were not measured yet" if unknown else ""
    )
    what = f"To compute: {count:,} rows and artifacts in {len(left)} of {len(stages)} stages."
    return [*lines, "", what + (f"{time}." if time else "")]


def plan_row(stage: StagePlan) -> tuple[str, str, str, str, str, str]:
    """Stage, rows present and missing, tokens, expected time, why and what else there is to say."""
    tokens = f"{stage.tokens:,.0f}" if stage.missing and stage.tokens is not None else ""
    why = "; ".join(filter(None, (stage.why, stage.note)))
    return stage.stage, f"{stage.present:,}", f"{stage.missing:,}", tokens, _expected(stage), why


def _expected(stage: StagePlan) -> str:
    if not stage.missing:
        return ""
    return "?" if stage.seconds is None else duration(stage.seconds)


def duration(seconds: float) -> str:
    """1.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned by width; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [text[0], "  ".join("─" * width for width in widths), *text[1:]]


def result_lines(workspace: Workspace) -> list[str]:
    """The outcome, the headlines, the numbers, what was left out, how much of the training is in what was
    saved and in what was drawn from, and the paths.
    """
    made = results(workspace)
    result = result_of(made.evaluate)
    diagnostics: dict[str, Any] = made.train.facts["diagnostics"]
    rows = [("held-out evaluation", ""), *summary_rows(result), *normalisation_rows(diagnostics)]
    left = [("left out, merged or failed", "count", "why")]
    gone = [*filtered(made.experiment, made.prompts, made.rounds), *unusable_rows(made.left_out)]
    left += [(row["what"], f"{row['count']:,}", row["why"]) for row in gone]
    policy = workspace.artifacts.folder(made.train, "policy")
    paths = [f"Policy: {policy}", f"Report: {report_path(workspace)}"]
    ends = [f"{label}: {value}" for label, value in saved_rows(made)]
    return [
        str(outcome(result)),
        *headline_lines(made),
        "",
        *table(rows),
        "",
        *table(left),
        "",
        *ends,
        *paths,
    ]


def headline_lines(made: Results) -> list[str]:
    """What stands under the first line of a result, each line whole."""
    result, drawn = result_of(made.evaluate), made.evaluate.facts["drawn"]
    finished = Finished(made.experiment, made.prompts, made.rounds, result, drawn, made.doubts)
    return [str(each) for each in headlines(finished)]


def saved_rows(made: Results) -> list[tuple[str, str]]:
    """How much of the training is in the saved policies, and in what the rewards were drawn from."""
    return survival_rows([each.train.facts["saved"] for each in made.rounds], made.evaluate.facts["drawn"])


def normalisation_rows(diagnostics: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows on the normalisation check: with the normaliser in use, and with the one that knows no ties."""
    found = normalisation(diagnostics)
    if found is None:
        return []
    text, _, meaning = found
    rows = [(f"Normalisation check ({diagnostics['normaliser']})", f"{text}, must be 1. {meaning}")]
    if diagnostics["normaliser"] != "population":
        other = diagnostics["normalisation_mean_population"]
        rows.append(
            (
                "The same with the population normaliser",
                f"{other:.3g} (tie rate {diagnostics['tie_rate']:.1%})",
            )
        )
    return rows


@dataclass(frozen=True)
class Results:
    """The manifests of a finished run.

    left_out : the rows that it could not use. doubts : why scorers are not to be trusted.
    """

    experiment: Experiment
    prompts: Manifest
    rounds: tuple[Made, ...]
    evaluate: Manifest
    report: Manifest
    left_out: LeftOut
    doubts: Sequence[Mapping[str, Any]]

    @property
    def train(self) -> Manifest:
        """The training whose policy is the result."""
        return self.rounds[-1].train


def results(workspace: Workspace) -> Results:
    """What a finished run made; MissingError names the first that is absent."""
    chain, get = stored_chain(workspace), workspace.artifacts.get
    rounds = list(chain.rounds())
    made = tuple(each.made for each in rounds)
    end = chain.after(rounds[-1])
    left_out, experiment = chain.found.left_out, workspace.experiment
    evaluate, report = get(end.evaluate), get(end.report)
    return Results(experiment, get(chain.prompts), made, evaluate, report, left_out, chain.doubts)


def report_path(workspace: Workspace) -> Path:
    """A local path of the HTML report; downloaded once from a remote store."""
    return workspace.artifacts.file(results(workspace).report, "report.html")
