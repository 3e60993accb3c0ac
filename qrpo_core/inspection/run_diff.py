"""`qrpo diff`: two runs of a store beside each other, and which policy is ahead where that can be said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from qrpo_core.common.schemas import check_table
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER, RewardedPair
from qrpo_core.evaluation.metrics import bootstrap, prompt_means
from qrpo_core.inspection.runs import compared_rows, places, short_text
from qrpo_core.pipeline.run_ledger import RunLedger, StoredRun
from qrpo_core.reporting.summary import change_text
from qrpo_core.reporting.text_table import table
from qrpo_core.store.blocks.tables import from_parquet
from qrpo_core.store.manifest import Manifest

Row = tuple[str, str, str]


def diff_lines(ledger: RunLedger, first: StoredRun, second: StoredRun) -> list[str]:
    """The settings in which two runs differ, their results, and which policy has the larger reward."""
    head: Row = ("", f"run {first.number}", f"run {second.number}")
    rows: list[Row] = [head]
    for what, each in (
        ("run", "digest"),
        ("experiment", "name"),
        ("date", "minute"),
        ("made by qrpo", "code"),
    ):
        values = (first.train.code, second.train.code) if each == "code" else _both(first, second, each)
        rows.append((what, *values))
    settings = _settings(first, second)
    lines = [f"Store: {ledger.objects.url}", "", *table(rows), "", "Settings that differ"]
    lines += table([head, *settings]) if settings else ["none: the same recipe of training"]
    lines += ["", *table([head, *_results(ledger, first, second)]), "", ahead(ledger, first, second)]
    for run in (first, second):
        lines += [f"{what} of run {run.number}: {place}" for what, place in places(ledger, run).items()]
    return lines


def ahead(ledger: RunLedger, first: StoredRun, second: StoredRun) -> str:
    """The mean difference of the two policies' rewards, with its interval, or why there is none."""
    if first.evaluated is None or second.evaluated is None:
        return "Not compared: a run is not evaluated."
    sides = (first.evaluated, second.evaluated)
    if len({each.recipe["inputs"]["rewards_before"] for each in sides}) > 1:
        return "Not compared prompt by prompt: the reward, the held-out prompts or the sampling differ."
    after = [_after(ledger, each) for each in sides]
    shared = set(_keys(after[0])) & set(_keys(after[1]))
    if not shared:
        return "Not compared prompt by prompt: they were evaluated on other prompts."
    pair = RewardedPair(_only(after[0], shared), _only(after[1], shared), "diff")
    means = prompt_means(pair)
    (difference,) = bootstrap(means.difference[np.newaxis], EvaluationConfig())
    return (
        f"Mean reward of run {second.number} less that of run {first.number}, after training, on the same "
        f"{len(means.prompt_ids):,} prompts (95 % interval over prompts): {change_text(difference)}. Another "
        "training seed can move it further; qrpo compare trains several."
    )


def _after(ledger: RunLedger, evaluated: Manifest) -> pa.Table:
    """The completions of the trained policy with their rewards, EVALUATED rows."""
    data = ledger.artifacts.read(evaluated, "after.parquet")
    rows = check_table(from_parquet(data), EVALUATED_AFTER, evaluated.path("after.parquet"))
    return rows.select(EVALUATED.names)


def _keys(table: pa.Table) -> list[tuple[str, int]]:
    return list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))


def _only(table: pa.Table, rows: set[tuple[str, int]]) -> pa.Table:
    return table.filter(pa.array([key in rows for key in _keys(table)], pa.bool_()))


def _both(first: StoredRun, second: StoredRun, name: str) -> tuple[str, str]:
    values = [str(getattr(run, name)) or "not known" for run in (first, second)]
    return values[0], values[1]


def _settings(first: StoredRun, second: StoredRun) -> list[Row]:
    """The settings that both have and that differ, then those that one alone has."""
    ours, theirs = first.settings, second.settings
    differ = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    rows = [(key, short_text(ours[key]), short_text(theirs[key])) for key in differ]
    if (first.experiment is None) == (second.experiment is None):
        alone = [key for key in (*ours, *theirs) if (key in ours) != (key in theirs)]
        rows += [(key, _of(ours, key), _of(theirs, key)) for key in alone]
    return rows


def _of(settings: Mapping[str, Any], key: str) -> str:
    return short_text(settings[key]) if key in settings else "–"


def _results(ledger: RunLedger, first: StoredRun, second: StoredRun) -> list[Row]:
    """The rows of both results by label; "–" where a run lacks one."""
    found = []
    for run in (first, second):
        result = run.result
        found.append({} if result is None else dict(compared_rows(ledger, run, result)))
    labels = dict.fromkeys((*found[0], *found[1]))
    return [(label, found[0].get(label, "–"), found[1].get(label, "–")) for label in labels]
