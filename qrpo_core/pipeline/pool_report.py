"""The pool report: what the references and their rewards say before anything is trained on them.

The pool is the set of completions that others are ranked among, with their rewards; without a ranking, the
completions that are trained on. Each judge of the evaluation scores a sample of it. The experiment's other
stages do not need the report, so `qrpo run` does not make it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.config import cache_key_fields
from qrpo_core.evaluation import pool_report
from qrpo_core.evaluation.judge_agreement import judge_agreement, mid_rank, rank_correlation
from qrpo_core.evaluation.pool_report import JudgedPool, LengthFacts, PoolReport, RewardSpread
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.diagnostics import length_correlation, reward_diagnostics
from qrpo_core.objective_kinds import make_objective
from qrpo_core.objective_kinds.targets import QuantileObjective
from qrpo_core.pipeline.budgets import Scored
from qrpo_core.pipeline.completions import Rewards, Unscored
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.learning_signal import status_facts
from qrpo_core.pipeline.row_recipes import reward_recipe
from qrpo_core.pipeline.row_steps import RewardStep
from qrpo_core.pipeline.stage_names import of_pool_judge
from qrpo_core.pipeline.truncated import training_rewards
from qrpo_core.pipeline.workspace import Built, Workspace
from qrpo_core.reporting.html.pool import render_pool_report
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 1


@dataclass(frozen=True)
class PoolSteps:
    """The judges' steps on a pool, and the recipe of the report.

    rewards : of the pool. prompts_recipe : of the prompts. left_out : names what the check of the rows leaves
        out.
    """

    workspace: Workspace
    rewards: Rewards
    prompts_recipe: Recipe
    left_out: str

    @cached_property
    def table(self) -> pa.Table:
        """The pool's REWARDS rows as training sees them, and the column `cut`."""
        return training_rewards(self.workspace.experiment, self.rewards)

    @cached_property
    def scored(self) -> Scored:
        """The pool's rewards; MissingError where no prompt has two."""
        return Scored.of(self.table)

    @cached_property
    def judges(self) -> Mapping[str, RewardStep]:
        """The step of each judge, by its name: a sample of the pool that does not depend on the judge."""
        section = self.workspace.experiment.pool_report
        scored = self.scored
        ends = scored.rows.group_by("prompt_id").aggregate([("reward", "min"), ("reward", "max")])
        unequal = ends.filter(pc.not_equal(ends["reward_min"], ends["reward_max"]))["prompt_id"].to_pylist()
        # Ids are digests, so the first in order are a random sample, and the same ones as prompts are added.
        chosen, wanted = sorted(unequal)[: section.prompts], self.rewards.completions.wanted
        rows = {prompt: wanted[prompt][: section.completions_per_prompt] for prompt in chosen}
        return {
            name: RewardStep(self.rewards.completions, of_pool_judge(name), scorer, rows)
            for name, scorer in self.workspace.experiment.evaluation.judges.items()
        }

    @property
    def recipe(self) -> Recipe:
        """Decided by the pool, the judges and their sample, and the objective; the name is in the title."""
        experiment, blocks = self.workspace.experiment, self.workspace.blocks
        data = cache_key_fields(experiment.decided_data)
        config: dict[str, Any] = {
            "name": experiment.name,
            "pool_report": cache_key_fields(experiment.pool_report),
            "objective": cache_key_fields(experiment.objective),
            "truncated": {name: data[name] for name in ("truncated", "truncated_reward")},
            "confidence": experiment.evaluation.confidence,
            "seed": experiment.evaluation.seed,
            "rows": self.rewards.completions.extent,
            "left_out": self.left_out,
        }
        retryable = {"rewards": self.rewards.retryable_digest}
        inputs = {"prompts": self.prompts_recipe.key, "rewards": self.rewards.recipe.key}
        for name, recipe in self.judge_recipes.items():
            inputs[f"judge {name}"] = recipe.key
            if blocks.retryable(recipe):
                retryable[f"judge {name}"] = self.judges[name].retryable_digest
        return Recipe("pool_report", VERSION, config | {"retryable": retryable}, inputs)

    @property
    def judge_recipes(self) -> Mapping[str, Recipe]:
        """The recipe of each judge's rows, by its name; ConfigError for one that is the reward itself."""
        texts = self.rewards.completions.texts
        found = {
            name: reward_recipe(self.workspace, texts, scorer)
            for name, scorer in self.workspace.experiment.evaluation.judges.items()
        }
        for name, recipe in found.items():
            if recipe == self.rewards.recipe:
                raise ConfigError(
                    "the judge is the reward itself, with which it agrees by definition",
                    where=f"evaluation.judges.{name}",
                    remedy="name another reward, or leave it out",
                )
        return found

    def require_pool(self) -> None:
        """Raise MissingError where rewards of the pool are not in the store yet."""
        if not isinstance(self.rewards, RewardStep):
            return
        absent = self.workspace.blocks.missing(self.rewards.recipe, self.rewards.wanted).absent
        if count := sum(each.count for each in absent):
            raise MissingError(
                f"{count:,} rewards of the pool are not in the store",
                where=self.workspace.objects.url,
                remedy="qrpo run EXPERIMENT --flow precompute draws and scores the references",
            )


def pool_steps(known: ExperimentSteps) -> PoolSteps:
    """The steps of the pool report. ConfigError where the pool has no rewards, or a judge is the reward."""
    first = known.first
    rewards = first.references or first.rewards
    if isinstance(rewards, Unscored):
        raise ConfigError(
            "the pool has no rewards: labels alone decide the pairs",
            where="training_data.preference 'label'",
            remedy="set training_data.preference to reward",
        )
    steps = PoolSteps(known.workspace, rewards, known.prompts_recipe, first.left_out)
    _ = steps.judge_recipes
    return steps


def build(steps: PoolSteps) -> Manifest:
    """Commit `pool.json` and `pool.html`; the facts of the artifact hold the report as well."""

    def make(scratch: Path) -> Built:
        report = report_of(steps)
        files: dict[str, Path | bytes] = {
            "pool.json": json.dumps(report.to_dict(), indent=1, allow_nan=False).encode(),
            "pool.html": render_pool_report(report).encode(),
        }
        return files, {"report": report.to_dict()}

    return steps.workspace.make(steps.recipe, make)


def stored_report(manifest: Manifest) -> PoolReport:
    """The report that an artifact holds."""
    return PoolReport.from_dict(manifest.facts["report"], f"pool_report/{manifest.key}")


def report_of(steps: PoolSteps) -> PoolReport:
    """The report of a pool whose rows are in the store."""
    experiment, scored = steps.workspace.experiment, steps.scored
    objective = make_objective(experiment.objective)
    ratio = objective.ratio() if isinstance(objective, QuantileObjective) else None
    values = scored.rows["reward"].to_numpy().astype(np.float64)
    statuses = {name: each["count"] for name, each in status_facts(steps.table).items() if name != "ok"}
    given = not isinstance(steps.rewards, RewardStep)
    return PoolReport(
        name=experiment.name,
        reward="given by the data set" if given else experiment.reward.kind,
        objective=objective.kind,
        beta=None if ratio is None else ratio.beta,
        confidence=experiment.evaluation.confidence,
        statuses=statuses,
        spread=_spread(scored, values),
        length=_lengths(steps, values),
        more=pool_report.more_references(scored.codes, values, ratio=ratio),
        judges={name: _judged(steps, step, ratio) for name, step in steps.judges.items()},
    )


def _spread(scored: Scored, values: Any) -> RewardSpread:
    found = reward_diagnostics(scored.codes, values)
    distinct, common = pool_report.common_rewards(values)
    return RewardSpread(
        prompts=found.prompts,
        references=found.references,
        fewest=int(scored.sizes.min()),
        most=int(scored.sizes.max()),
        distinct=distinct,
        common=common,
        tie_rate=found.tie_rate,
        largest_atom=found.largest_atom,
        signal_free_prompts=found.signal_free_prompts,
        floor=reward_diagnostics(scored.codes, -values).ceiling,
        ceiling=found.ceiling,
    )


def _lengths(steps: PoolSteps, values: Any) -> LengthFacts:
    """The reward beside the length; an empty completion counts as one token."""
    scored, evaluation = steps.scored, steps.workspace.experiment.evaluation
    lengths, quantiles = _tokens(steps, scored.rows), mid_rank(scored.codes, values)
    cut = scored.rows["cut"].to_numpy(zero_copy_only=False)
    correlation = length_correlation(scored.codes, values, lengths)
    return LengthFacts(
        mean=float(lengths.mean()),
        correlation=None if math.isnan(correlation) else correlation,
        rank_correlation=rank_correlation(
            scored.codes, values, lengths, confidence=evaluation.confidence, seed=evaluation.seed
        ),
        groups=pool_report.length_groups(scored.codes, lengths, quantiles),
        cut=pc.sum(steps.table["cut"]).as_py() or 0,
        completions=len(steps.table),
        cut_quantile=float(quantiles[cut].mean()) if cut.any() else None,
    )


def _tokens(steps: PoolSteps, rows: pa.Table) -> Any:
    keys = zip(rows["prompt_id"].to_pylist(), rows["sample_index"].to_pylist(), strict=True)
    return np.maximum(steps.rewards.completions.lengths(list(keys)).to_numpy().astype(np.float64), 1.0)


def _judged(steps: PoolSteps, step: RewardStep, ratio: DensityRatio | None) -> JudgedPool:
    """A judge's scores beside the rewards of the same rows."""
    experiment, scored, rows = steps.workspace.experiment, steps.scored, step.read()
    statuses = {name: each["count"] for name, each in status_facts(rows).items() if name != "ok"}
    names = ("prompt_id", "sample_index")
    counts = scored.counts
    pool = scored.rows.select([*names, "reward"]).append_column("code", pa.array(scored.codes))
    pool = pool.append_column("place", pa.array((counts.below + 0.5 * (counts.equal + 1)) / (counts.n + 1)))
    ok = rows.filter(pc.equal(rows["status"], "ok")).select([*names, "reward"])
    both = ok.rename_columns([*names, "score"]).join(pool, list(names), join_type="inner").sort_by("code")
    columns = {name: both[name].to_numpy() for name in ("code", "reward", "place", "score")}
    references = int(np.median(scored.sizes))
    agreement = None
    if _has_pairs(columns["code"], columns["reward"]):
        agreement = judge_agreement(
            columns["code"],
            columns["reward"],
            columns["place"],
            columns["score"],
            _tokens(steps, both),
            references=references,
            confidence=experiment.evaluation.confidence,
            seed=experiment.evaluation.seed,
        )
    return pool_report.judged_pool(
        len(rows),
        statuses,
        agreement,
        ratio=ratio,
        references=references,
    )


def _has_pairs(code: Any, rewards: Any) -> bool:
    """Whether two rows of a prompt have unequal rewards. code : ascending."""
    return any(np.ptp(part) > 0 for part in np.split(rewards, np.flatnonzero(np.diff(code)) + 1) if len(part))
