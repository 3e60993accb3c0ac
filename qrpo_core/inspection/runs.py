"""The runs of a store as text: a table of all, one run's result, and two runs beside each other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from qrpo_core.common.errors import DataError
from qrpo_core.common.formatting import with_error
from qrpo_core.config import StoreConfig
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.inspection.result import normalisation_rows
from qrpo_core.pipeline import benchmarks
from qrpo_core.pipeline.run_ledger import RunLedger, StoredRun
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.reporting.summary import change_text, outcome, result_text, summary_rows, survival_rows
from qrpo_core.reporting.text_table import table
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.inputs import FOLDER, SCHEME
from qrpo_core.store.manifest import Manifest

#: Settings that columns of their own show, or that follow from the others.
_SHOWN_APART = ("objective.kind", "training set")

#: Longest value of a setting in the table of runs.
_LONGEST = 30

HEAD = ("no.", "run", "date", "experiment", "objective", "settings that differ")
OUTCOME = ("reward", "difference, paired", "judges", "KL, nats")


def run_lines(ledger: RunLedger) -> list[str]:
    """A table of the runs with the settings in which those of one experiment differ, and their files."""
    head = [f"Store: {ledger.objects.url}", ""]
    if not ledger.runs:
        return [*head, *_damaged(ledger), "No run. --store PATH names another store."]
    lines = [*head, *table([(*HEAD, *OUTCOME), *run_rows(ledger.runs)]), *_damaged(ledger)]
    lines += ["", "Policies and reports:"]
    for run in ledger.runs:
        lines += [f"{run.number}  {place}" for place in places(ledger, run).values()]
    verbs = "A run in full: qrpo show RUN; its settings: qrpo config RUN; two: qrpo diff RUN RUN."
    return [*lines, "", f"{verbs[:-1]}{also(ledger)}."]


def also(ledger: RunLedger, before: str = ", each with ") -> str:
    """The option that commands about these runs need; "" for the store that they look into by default.

    before : the words in front of it.
    """
    default = open_objects(StoreConfig()).url
    return "" if ledger.objects.url == default else f"{before}--store {shlex.quote(ledger.objects.url)}"


def _damaged(ledger: RunLedger) -> list[str]:
    """A line for each manifest that hides its run."""
    remedy = "qrpo verify EXPERIMENT --all --repair quarantines it"
    return [f"Damaged, so its run is not shown: {key}; {remedy}." for key in sorted(ledger.damaged)]


def run_rows(runs: Sequence[StoredRun]) -> list[tuple[str, ...]]:
    """One row for each run, as in `HEAD` and `OUTCOME`."""
    differ = differing(runs)
    return [
        (
            f"{run.number}",
            run.digest[:8],
            run.minute,
            run.name or "not known",
            str(run.settings["objective.kind"]),
            differ[run.digest],
            *_outcome(run),
        )
        for run in runs
    ]


def differing(runs: Sequence[StoredRun]) -> dict[str, str]:
    """By digest of a run, the settings in which it differs from others of its experiment's name."""
    found = {}
    for name in {run.name for run in runs}:
        group = [run for run in runs if run.name == name]
        keys = [key for key in _differing_keys(group) if key not in _SHOWN_APART]
        ends = [key.rpartition(".")[2] for key in keys]
        labels = {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
        texts = {
            run.digest: ", ".join(
                f"{labels[key]} {short_text(run.settings[key])}" for key in keys if key in run.settings
            )
            for run in group
        }
        for run in group:
            others = {
                each.settings["training set"] for each in group if texts[each.digest] == texts[run.digest]
            }
            data = [f"training set {run.settings['training set']}"] if len(others) > 1 else []
            found[run.digest] = ", ".join([each for each in (texts[run.digest], *data) if each])
    return found


def _differing_keys(runs: Sequence[StoredRun]) -> list[str]:
    """The settings with several values among those runs that have them, in the order of the settings."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(str(value))
    return [key for key, each in values.items() if len(each) > 1]


def short_text(value: Any) -> str:
    """A setting's value, cut where it is long; of a stored file its name and its digest's first digits."""
    text = "none" if value is None else str(value)
    if text.startswith(f"{SCHEME}{FOLDER}/"):
        _, digest, name = text.split("/", 2)
        text = f"{name} ({digest[:8]})"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _outcome(run: StoredRun) -> tuple[str, ...]:
    """Rewards before and after, their difference, that of each judge, and the KL."""
    try:
        result = run.result
    except DataError:
        return "of another version", *("",) * (len(OUTCOME) - 1)
    if result is None:
        return "not evaluated", *("",) * (len(OUTCOME) - 1)
    text = result_text(result)
    return (
        f"{text['before']} → {text['after']}",
        f"{text['difference']} {text['difference_interval']}".strip(),
        "; ".join(f"{name} {change_text(judge.difference)}" for name, judge in result.judges.items()),
        with_error(result.kl.value, result.kl.standard_error),
    )


def places(ledger: RunLedger, run: StoredRun) -> dict[str, str]:
    """The addresses of policy and report."""
    found = {"Policy": ledger.place(run.train, "policy")}
    return found | ({"Report": ledger.place(run.report, "report.html")} if run.report else {})


def show_lines(ledger: RunLedger, run: StoredRun) -> list[str]:
    """The outcome, headlines and numbers of a run, from its manifests alone, and where its files are."""
    name = run.name or "an experiment whose name was not kept"
    lines = [f"Store: {ledger.objects.url}", f"Run {run.number} ({run.digest[:8]}): {name}, {run.minute}", ""]
    if (result := run.result) is None:
        lines += ["Not evaluated.", ""]
    else:
        lines += [str(outcome(result)), *_headlines(run), "", *table(result_rows(ledger, run, result)), ""]
    lines += [f"{what}: {place}" for what, place in places(ledger, run).items()]
    return [*lines, f"Settings: qrpo config {run.digest[:8]}{also(ledger, ' ')}"]


def _headlines(run: StoredRun) -> Sequence[str]:
    kept: Sequence[str] = () if run.report is None else run.report.facts.get("headlines", ())
    return kept


def result_rows(ledger: RunLedger, run: StoredRun, result: EvaluationResult) -> list[tuple[str, str]]:
    """The rows of an evaluated run: evaluation, benchmarks, normalisation, what was saved."""
    diagnostics: dict[str, Any] = run.train.facts["diagnostics"]
    drawn = None if run.evaluated is None else run.evaluated.facts["drawn"]
    about = [*normalisation_rows(diagnostics), *survival_rows([run.train.facts["saved"]], drawn)]
    return [("held-out evaluation", ""), *compared_rows(ledger, run, result), ("training", ""), *about]


def compared_rows(ledger: RunLedger, run: StoredRun, result: EvaluationResult) -> list[tuple[str, str]]:
    """The rows of the evaluation and the benchmarks."""
    tested = _benchmarks(ledger, run.report)
    head = [("benchmarks, before → after training", "")] if tested else []
    return [*summary_rows(result), *head, *benchmark_rows(tested)]


def _benchmarks(ledger: RunLedger, report: Manifest | None) -> Mapping[str, Any]:
    """The results of the benchmarks that the report shows, by name."""
    if report is None:
        return {}
    names = {
        key: name.removeprefix("benchmark ")
        for name, key in report.recipe["inputs"].items()
        if name.startswith("benchmark ")
    }
    made = ledger.artifacts.manifests("benchmark") if names else ()
    return {names[each.key]: benchmarks.result_of(each) for each in made if each.key in names}
