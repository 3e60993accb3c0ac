"""The comparison of trained variants: its recipe, its choice of settings, and its artifact.

Its inputs are the evaluations of the variants, each under its own recipe. So a comparison with one variant or
one seed more reads the others from the store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.evaluation.comparison import compare_scores, variant_facts
from qrpo_core.evaluation.comparison_results import Choice, ComparisonResult, VariantFacts
from qrpo_core.evaluation.crossed import CrossedMean
from qrpo_core.pipeline.comparison_rows import COMPARED, Measured, VariantRun, judge_measure
from qrpo_core.pipeline.held_out_part import PARTS, HeldOutPart
from qrpo_core.pipeline.prompts import find, of_split
from qrpo_core.pipeline.prompts import recipe as prompts_recipe
from qrpo_core.pipeline.variants import Variant
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.reporting.comparison_text import (
    choice_rows,
    comparison_rows,
    doubts,
    failures,
    headline,
    method_text,
    pair_lines,
)
from qrpo_core.reporting.text_table import table
from qrpo_core.rewards.registry import sees
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 2
STEP = "compare"


@dataclass(frozen=True)
class Comparison:
    """The trainings that are compared, and the held-out prompts that count.

    workspace : of the pool. config : as it was asked for. runs : every training; one at least succeeded.
    choices : what the validation prompts chose; empty where nothing is chosen.
    """

    workspace: Workspace
    config: ComparisonConfig
    runs: Sequence[VariantRun]
    choices: Sequence[Choice] = ()

    @cached_property
    def recipe(self) -> Recipe:
        """Decided by the evaluations, the prompts that count, the choices, and the trainings that failed."""
        experiment = self.workspace.experiment
        config = {
            "name": experiment.name,
            "runs": [str(run) for run in self.runs],
            "failed": {str(run): run.error for run in self.runs if run.evaluated is None},
            "confidence": experiment.evaluation.confidence,
            "choices": [[each.group, each.chosen, each.candidates] for each in self.choices],
            "choosing": _choosing(self.config),
            "reward_is_judge": self._judges_that_are_the_reward,
        }
        done = {str(run): run.evaluated for run in self.runs if run.evaluated is not None}
        before = next(iter(done.values())).before
        inputs = {name: steps.evaluate.key for name, steps in done.items()}
        inputs["rewards_before"] = before.rewards.recipe.key
        for name, judge in before.judges.items():
            inputs[f"{judge_measure(name)}, before"] = judge.recipe.key
        return Recipe(STEP, VERSION, config, inputs)

    def build(self) -> Manifest:
        """Commit `comparison.json`, `comparison.html`, and `rows.parquet` that they are computed from."""

        def make(scratch: Path) -> Built:
            from qrpo_core.reporting.html.comparison import render_comparison

            measured = Measured.of(self.workspace, self.runs)
            result = self._result(measured)
            plain = result.to_dict()
            settings = self.workspace.given.model_dump(mode="json")
            files: dict[str, Path | bytes] = {
                "comparison.json": json.dumps(plain).encode(),
                "rows.parquet": as_parquet(measured.rows(), COMPARED, "comparison"),
                "comparison.html": render_comparison(result, settings).encode(),
            }
            return files, {"result": plain}

        return self.workspace.make(self.recipe, make)

    def _result(self, measured: Measured) -> ComparisonResult:
        experiment = self.workspace.experiment
        evaluation = experiment.evaluation
        scored = [
            replace(
                compare_scores(name, measured.measures[name], measured.variants, evaluation.confidence),
                silent=measured.silent(name),
            )
            for name in measured.scorers
        ]
        return ComparisonResult(
            seeds=measured.seeds,
            confidence=evaluation.confidence,
            prompts=len(measured.prompts),
            samples_per_prompt=evaluation.samples_per_prompt,
            variants=tuple(self._facts(measured, place) for place in range(len(measured.variants))),
            scorers=tuple(scored),
            tokens_before=float(measured.measures["tokens"].before.mean()),
            length_slopes=dict(measured.slopes),
            choices=tuple(self.choices),
            choosing=_choosing(self.config),
            unbiased=experiment.sampling.top_p == 1,
            training_rewards=tuple(self._judges_that_are_the_reward),
        )

    def _facts(self, measured: Measured, place: int) -> VariantFacts:
        name = measured.variants[place]
        failed = {run.seed: run.error for run in self.runs if run.variant == name and run.evaluated is None}
        confidence = self.workspace.experiment.evaluation.confidence
        return variant_facts(name, place, measured.measures, failed, confidence)

    @property
    def _judges_that_are_the_reward(self) -> list[str]:
        experiment = self.workspace.experiment
        judges = experiment.evaluation.judges
        return [judge_measure(name) for name, judge in judges.items() if sees(experiment.reward, judge)]


def result_of(manifest: Manifest) -> ComparisonResult:
    """The comparison that an artifact holds."""
    return ComparisonResult.from_dict(manifest.facts["result"], f"{STEP}/{manifest.key}")


def comparison_lines(workspace: Workspace, manifest: Manifest) -> list[str]:
    """The comparison for a terminal: headline, table, differences, failures, and the page's path."""
    result = result_of(manifest)
    lines = [headline(result), *doubts(result), "", *table(comparison_rows(result)), "", *pair_lines(result)]
    if result.choices:
        lines += ["", f"Chosen {result.choosing}:", *table(choice_rows(result))]
    lines += ["", *(f"Failed: {line}" for line in failures(result)), method_text(result)]
    return [*lines, f"Page: {workspace.artifacts.file(manifest, 'comparison.html')}"]


def choose(
    workspace: Workspace, config: ComparisonConfig, variants: Sequence[Variant], runs: Sequence[VariantRun]
) -> list[Choice]:
    """Of each group of variants, the one with the largest mean gain on the validation prompts.

    A variant whose trainings failed is not chosen, unless all of its group's did.
    """
    measured = Measured.of(workspace, runs)
    scorer = "reward" if config.choose_by == "reward" else judge_measure(config.choose_by)
    seen = measured.measures[scorer].complete()
    gains = {
        name: CrossedMean.of(seen.after[place, seen.trained[place]] - seen.before).value
        for place, name in enumerate(measured.variants)
        if seen.trained[place].any()
    }
    found = []
    for group, members in groups(config, variants).items():
        chosen = max(members, key=lambda name: gains.get(name, -np.inf))
        found.append(Choice(group, chosen, {name: gains.get(name) for name in members}))
    return found


def groups(config: ComparisonConfig, variants: Sequence[Variant]) -> dict[str, list[str]]:
    """The names of the variants of each group, by the settings `choose_within` that its variants share.

    Raises ConfigError for a setting that does not exist.
    """
    found: dict[str, list[str]] = {}
    for variant in variants:
        values = ", ".join(str(_setting(variant, key)) for key in config.choose_within)
        found.setdefault(values, []).append(variant.name)
    return found


def check_choice(workspace: Workspace, config: ComparisonConfig, variants: Sequence[Variant]) -> None:
    """Raise ConfigError or DataError where the choice that is asked for cannot be made."""
    if config.choose_on == "nothing":
        return
    judges = workspace.experiment.evaluation.judges
    if config.choose_by != "reward" and config.choose_by not in judges:
        raise ConfigError(
            f"choose_by {config.choose_by!r} is neither 'reward' nor a judge",
            remedy=f"the judges of evaluation.judges are: {', '.join(judges) or 'none'}",
        )
    groups(config, variants)
    tables = find(workspace, prompts_recipe(workspace))
    held_out: list[str] = of_split(tables.prompts, "held_out")["prompt_id"].to_pylist()
    for part in PARTS:
        if not any(HeldOutPart(part, config.validation_share).mask(held_out)):
            raise DataError(
                f"none of the {len(held_out)} held-out prompts is in the {part} part",
                where=f"validation_share {config.validation_share:g}",
                remedy="raise prompts.held_out, or choose another validation_share",
            )


def _setting(variant: Variant, key: str) -> object:
    place: object = variant.experiment
    for part in key.split("."):
        if part not in getattr(type(place), "model_fields", ()):
            raise ConfigError(f"choose_within {key!r} is not a setting", remedy="see qrpo config")
        place = getattr(place, part)
    return place


def _choosing(config: ComparisonConfig) -> str:
    """How settings were chosen, in words; "" where nothing is."""
    if config.choose_on == "nothing":
        return ""
    return (
        f"by the mean gain of {config.choose_by} on the validation prompts (about "
        f"{config.validation_share:.0%} of the held-out prompts, by hash) over {config.choose_seeds} "
        f"training seeds that are not compared, within the same {', '.join(config.choose_within)}"
    )
