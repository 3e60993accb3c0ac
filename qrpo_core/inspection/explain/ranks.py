"""The ranks, targets and pairs of one prompt's completions in a round of training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import PAIRS, RANK_COUNTS, REFERENCE_REWARDS
from qrpo_core.config import Experiment
from qrpo_core.objective.quantiles import quantile_interval
from qrpo_core.objective_kinds import make_objective
from qrpo_core.pipeline.ranked import target_objective
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.training_targets import TrainingData, derive
from qrpo_core.pipeline.truncated import truncation_in_words

#: Level of the exact interval of a quantile.
LEVEL = 0.95

Row = dict[str, Any]


@dataclass
class PromptInRound:
    """The data of a round's artifacts on one prompt; `notes` name the artifacts that do not exist yet.

    ranked : whether the quantiles exist. By sample_index: counts, the RANK_COUNTS rows; targets, with
    quantile, transformed, beta, log_partition (nats), target (reward units), log_ratio_target (nats; None:
    the completion is to be given up); ref_logprobs and token_ids of the training set. references : sorted
    rewards of the reference completions. pairs : PAIRS rows. facts : settings of the targets.
    """

    experiment: Experiment
    ranked: bool = False
    counts: dict[int, Row] = field(default_factory=dict)
    references: list[float] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    ref_logprobs: dict[int, float] = field(default_factory=dict)
    targets: dict[int, Row] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def brief(self, index: int) -> Row:
        """The columns of one completion in the table of all completions."""
        count, target = self.counts.get(index, {}), self.targets.get(index, {})
        names = ("quantile", "target", "log_ratio_target")
        return {name: count.get(name) for name in ("below", "equal", "n")} | {
            name: target.get(name) for name in names
        }

    def of_prompt(self) -> Row:
        """The data that all completions of the prompt share."""
        return {"reference_rewards": self.references, "objective": self.facts}

    def of_completion(self, index: int) -> Row:
        """All data on one completion; None for missing values."""
        return {
            "ranks": self._ranks(index),
            "targets": self.targets.get(index),
            "ref_logprob": self.ref_logprobs.get(index),
            "pairs": [pair for pair in self.pairs if index in (pair["chosen"], pair["rejected"])],
        }

    def reasons(self, index: int, status: str | None, cut: bool) -> list[str]:
        """The reasons why a scored completion has no ranks or no target, if the artifacts exist.

        cut : whether the length limit ended it.
        """
        if not self.ranked or status is None:
            return []
        if cut and self.experiment.training_data.truncated != "keep":
            why = [f"cut by the length limit: {truncation_in_words(self.experiment)}"]
            return why + self._reasons(index, "ok") if index in self.counts else why
        return self._reasons(index, status)

    def _reasons(self, index: int, status: str) -> list[str]:
        if index not in self.counts:
            if status != "ok":
                return [f"status {status}: in no quantile"]
            if not self.counts:
                return ["not ranked: its prompt has too few scored completions"]
            return [f"not trained on: training_data.mode {self.experiment.training_data.mode!r}"]
        if not self.experiment.objective.has_targets:
            return [f"objective {self.experiment.objective.kind!r} has no targets"]
        if self.facts and index not in self.targets:
            return [
                f"no target: too few references for {target_objective(self.experiment.objective).needs_them}"
            ]
        return []

    def _ranks(self, index: int) -> Row | None:
        row = self.counts.get(index)
        if row is None:
            return None
        ranks = {name: row[name] for name in ("below", "equal", "n", "in_pool")}
        if not row["n"]:
            return ranks | {"interval": None}
        lower, upper = quantile_interval(row["below"], row["equal"], row["n"], LEVEL)
        return ranks | {"interval": {"level": LEVEL, "lower": float(lower[0]), "upper": float(upper[0])}}


def prompt_in_round(round_: Round, prompt: str) -> PromptInRound:
    """The data of a round's artifacts on one prompt; notes name the artifacts that do not exist yet."""
    workspace = round_.workspace
    found = PromptInRound(workspace.experiment)
    quantiles = workspace.artifacts.find(round_.quantiles_recipe)
    if quantiles is None:
        found.notes.append("not ranked yet")
        return found
    found.ranked = True
    counts = _of(workspace.load(quantiles, "rank_counts.parquet", RANK_COUNTS), prompt)
    found.counts = {row["sample_index"]: row for row in counts.to_pylist()}
    found.pairs = _of(workspace.load(quantiles, "pairs.parquet", PAIRS), prompt).to_pylist()
    references = _of(workspace.load(quantiles, "reference_rewards.parquet", REFERENCE_REWARDS), prompt)
    found.references = next(iter(references["rewards"].to_pylist()), [])
    training_set = workspace.artifacts.find(round_.training_set_recipe)
    if training_set is None:
        found.notes.append("no training set yet, so no targets")
        return found
    try:
        data = derive(workspace, training_set)
    except ObjectiveError as error:
        found.notes.append(f"no targets: {error}")
        return found
    _add_targets(found, data, prompt)
    return found


def _add_targets(found: PromptInRound, data: TrainingData, prompt: str) -> None:
    table = data.table.append_column("at", pa.array(np.arange(len(data.table))))
    rows = _of(table, prompt).select(["sample_index", "token_ids", "ref_logprob", "at"]).to_pylist()
    found.token_ids = {row["sample_index"]: row["token_ids"] for row in rows}
    found.ref_logprobs = {row["sample_index"]: row["ref_logprob"] for row in rows}
    objective = data.objective
    found.facts = {"kind": objective.kind, "beta": make_objective(objective).beta}
    targets = data.targets
    if targets is None:
        return
    kind = target_objective(objective)
    found.facts |= kind.facts()
    if kind.normalised:
        found.facts["normaliser"] = targets.normaliser
    for row in rows:
        at = row["at"]
        found.targets[row["sample_index"]] = {
            "quantile": float(targets.quantile[at]),
            "transformed": _finite(targets.transformed[at]),
            "beta": float(targets.beta[at]),
            "log_partition": float(targets.log_partition[at]),
            "target": _finite(targets.target[at]),
            "log_ratio_target": _finite(targets.log_ratio[at]),
        }


def _finite(value: float) -> float | None:
    """A number for JSON; None for -inf, the target of a completion that the policy is to give up (tup)."""
    return float(value) if np.isfinite(value) else None


def _of(table: pa.Table, prompt: str) -> pa.Table:
    return table.filter(pc.equal(table["prompt_id"], prompt))
