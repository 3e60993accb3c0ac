"""The result of a finished experiment as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrpo_core.config import Experiment
from qrpo_core.evaluation.benchmarks import BenchmarkResult
from qrpo_core.pipeline import benchmarks
from qrpo_core.pipeline.evaluation import result_of
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.rounds import RoundArtifacts
from qrpo_core.pipeline.run_headlines import Finished, headlines
from qrpo_core.pipeline.run_report import filtered, unusable_rows
from qrpo_core.pipeline.usable_rows import LeftOut
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.reporting.summary import normalisation, outcome, summary_rows, survival_rows
from qrpo_core.reporting.text_table import table
from qrpo_core.store.manifest import Manifest


def result_lines(workspace: Workspace) -> list[str]:
    """The outcome, headlines, numbers, rows left out, precision of the saved policies, and paths."""
    made = results(workspace)
    result = result_of(made.evaluate)
    diagnostics: dict[str, Any] = made.train.facts["diagnostics"]
    rows = [("held-out evaluation", ""), *summary_rows(result), *normalisation_rows(diagnostics)]
    if made.benchmarks:
        rows += [("benchmarks, before → after training", ""), *benchmark_rows(made.benchmarks)]
    left = [("left out, merged or failed", "count", "why")]
    gone = [*filtered(made.experiment, made.prompts, made.rounds), *unusable_rows(made.left_out)]
    left += [(row["what"], f"{row['count']:,}", row["why"]) for row in gone]
    policy = workspace.artifacts.folder(made.train, "policy")
    paths = [f"Policy: {policy}", f"Report: {report_path(workspace)}"]
    for name, manifest in made.tested.items():
        if (outputs := "model_outputs_after.json") in manifest.files:
            paths.append(f"Outputs for {name}: {workspace.artifacts.file(manifest, outputs)}")
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
    """The headlines below the outcome, one line each."""
    result, drawn = result_of(made.evaluate), made.evaluate.facts["drawn"]
    finished = Finished(made.experiment, made.prompts, made.rounds, result, drawn, made.reward_problems)
    return [str(each) for each in headlines(finished)]


def saved_rows(made: Results) -> list[tuple[str, str]]:
    """How much of the training the saved policies and the sampled policy keep."""
    return survival_rows([each.train.facts["saved"] for each in made.rounds], made.evaluate.facts["drawn"])


def normalisation_rows(diagnostics: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the normalisation check, and how far another log Z is above the tie-aware one."""
    rows = []
    for check in normalisation(diagnostics):
        where = check.where or diagnostics["normaliser"]
        rows.append((f"Normalisation check ({where})", f"{check.numbers}. {check.meaning}"))
    above = diagnostics.get("log_partition_above_tie_aware")
    if above is not None:
        tied = diagnostics["tie_rate"]
        rows.append(("Mean log Z above the tie-aware one", f"{above:+.2g} nats (tie rate {tied:.1%})"))
    return rows


@dataclass(frozen=True)
class Results:
    """The manifests of a finished run.

    left_out : the rows that it could not use. reward_problems : reasons not to trust scorers.
    tested : artifacts of the benchmarks by name.
    """

    experiment: Experiment
    prompts: Manifest
    rounds: tuple[RoundArtifacts, ...]
    evaluate: Manifest
    report: Manifest
    left_out: LeftOut
    reward_problems: Sequence[Mapping[str, Any]]
    tested: Mapping[str, Manifest]

    @property
    def benchmarks(self) -> dict[str, BenchmarkResult]:
        """The results of the benchmarks by name."""
        return {name: benchmarks.result_of(each) for name, each in self.tested.items()}

    @property
    def train(self) -> Manifest:
        """The last training: its policy is the result."""
        return self.rounds[-1].train


def results(workspace: Workspace) -> Results:
    """The manifests of a finished run; MissingError names the first absent one."""
    steps, get = stored_steps(workspace), workspace.artifacts.get
    rounds = list(steps.rounds())
    made = tuple(each.artifacts for each in rounds)
    end = steps.after(rounds[-1])
    left_out, experiment = steps.tables.left_out, workspace.experiment
    evaluate, report = get(end.evaluate), get(end.report)
    tested = {each.name: get(each.result) for each in end.benchmarks}
    return Results(
        experiment, get(steps.prompts_recipe), made, evaluate, report, left_out, steps.reward_problems, tested
    )


def report_path(workspace: Workspace) -> Path:
    """A local path of the HTML report; downloaded once from a remote store."""
    return workspace.artifacts.file(results(workspace).report, "report.html")
