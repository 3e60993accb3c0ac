"""`compare`: train variants of an experiment on one pool, and compare their policies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefect import flow

from flows.precompute import precompute
from flows.train import next_round
from qrpo_core.common.errors import BusyError, CapError, ObjectiveError, QRPOError
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.inspection.comparison_plan import (
    check_variants_memory,
    comparison_plan_lines,
    finished,
    plan_comparison,
    seeds_of,
)
from qrpo_core.pipeline.comparison import Comparison, check_choice, choose
from qrpo_core.pipeline.comparison_rows import VariantRun, refuse_silent_scorers
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.training import is_trained_now
from qrpo_core.pipeline.variants import Variant, check_variants, expand
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.manifest import Manifest
from tasks.compare_policies import compare_policies, publish_comparison_plan
from tasks.evaluate_policy import annotate_held_out, evaluate_policy, sample_held_out, score_held_out_logprobs
from tasks.experiment_form import FormExperiment
from tasks.interrupts import is_interrupt
from tasks.pipeline_run import PipelineRun
from tasks.progress import announce_fact, announce_problem
from tasks.run_names import run_name
from tasks.stages import Stage, beside
from tasks.train_policy import train_policy

#: Seconds between two looks whether another run has ended a training.
_LOOK = 5.0


@dataclass(frozen=True)
class Compared:
    """A finished comparison: its artifact, and what this run did. failed : trainings that failed."""

    manifest: Manifest
    stages: list[Stage]
    failed: int


class VariantsFailed(QRPOError):
    """Some variants failed; the comparison of the others is in the store, as `compared`."""

    compared: Compared


@flow(name="compare", flow_run_name=run_name)
def compare(experiment: FormExperiment, comparison: ComparisonConfig, pool: str | None = None) -> Compared:
    """Train every variant with every seed on one pool, evaluate all on the same prompts, and compare them.

    What the store has is reused: a repetition trains nothing, one variant more trains that one.

    Args:
        experiment: What the variants have in common; its store has the pool, or gets it.
        comparison: What varies, with how many training seeds, and what is chosen on validation prompts.
        pool: Work pool whose workers compute the missing rows before training; ray or ray://HOST:PORT for a
            Ray cluster; none for this run itself.
    """
    variants = expand(experiment, comparison)
    choosing, comparing = seeds_of(variants, comparison)
    with PipelineRun(variants[0].with_seed((*choosing, *comparing)[0])) as run:
        check_variants(run.workspace, variants)
        check_choice(run.workspace, comparison, variants)
        planned = plan_comparison(run.workspace, variants, comparison)
        check_variants_memory(run.workspace, planned, comparison, pooled=pool is not None)
        publish_comparison_plan(experiment.name, comparison_plan_lines(run.workspace, planned, comparison))
        trainings = Trainings(run, pool)
        trainings.prepare(variants)
        choices, chosen = [], variants
        if choosing:
            tried = trainings.run(variants, choosing, HeldOutPart.of(comparison, "validation"))
            refuse_without_result(tried)
            choices = choose(run.workspace, comparison, variants, tried)
            kept = {each.chosen for each in choices}
            chosen = tuple(variant for variant in variants if variant.name in kept)
        runs = trainings.run(chosen, comparing, HeldOutPart.of(comparison, "test"))
        refuse_without_result(runs)
        manifest = compare_policies(run, Comparison(run.workspace, comparison, runs, choices))
    compared = Compared(manifest, trainings.stages + run.stages, trainings.failed)
    if compared.failed:
        error = VariantsFailed(
            f"{compared.failed} trainings or evaluations failed; the others are compared",
            remedy="see what the comparison says of them; the next run tries them again",
        )
        error.compared = compared
        raise error
    return compared


@flow(name="variant", flow_run_name="{variant}")
def train_and_evaluate(experiment: Experiment, variant: str, part: HeldOutPart | None = None) -> list[Stage]:
    """Train one variant with one seed, and evaluate its policy on a part of the held-out prompts.

    variant : its name, for the UI. part : None for all of them.
    """
    with PipelineRun(experiment, part=part) as run:
        before = train_policy(run)
        for number in range(2, experiment.rounds.count + 1):
            run.stages += next_round(experiment, number, wait_for=[before])
        after = run.evaluation().after
        completions = sample_held_out(run, after)
        rewards = annotate_held_out(run, after, completions)
        logprobs = score_held_out_logprobs(run, completions)
        evaluate_policy(run, [*rewards, *logprobs])
    return run.stages


class Trainings:
    """The trainings of a comparison, one subflow each unless the store has it. One that fails ends itself.

    stages : what they did. failed : how many failed.
    """

    def __init__(self, run: PipelineRun, pool: str | None) -> None:
        self.workspace: Workspace = run.workspace
        self.shared, self.pool = run, pool
        self.stages: list[Stage] = []
        self.failed = 0
        self._refused: dict[str, str] = {}  # by variant: why it has no training set

    def prepare(self, variants: Sequence[Variant]) -> None:
        """The pool, the training sets that differ, and the evaluation of the reference policy."""
        for variant in variants:
            with beside(self.workspace, variant.experiment) as own:
                if variant is not variants[0]:
                    first = stored_steps(own).first
                    if own.artifacts.find(first.training_set_recipe) is not None:
                        continue
                try:
                    self.stages += precompute(variant.experiment, self.pool)
                except ObjectiveError as error:  # of its objective: another may do with the same pool
                    self._refused[variant.name] = str(error)
        before = self.shared.experiment_steps.before
        annotate_held_out(self.shared, before, sample_held_out(self.shared, before))
        refuse_silent_scorers(before)

    def run(
        self, variants: Sequence[Variant], seeds: Iterable[int], part: HeldOutPart | None
    ) -> list[VariantRun]:
        """Every variant with every seed, evaluated on `part`; a seed's come before the next's.

        What another run trains at this moment comes last: then its policy is in the store.
        """
        wanted = [(variant, seed) for seed in seeds for variant in variants]
        found: dict[int, VariantRun] = {}
        said = False
        while len(found) < len(wanted):
            before = len(found)
            for place, (variant, seed) in enumerate(wanted):
                if place not in found and (made := self._run(variant, seed, part)) is not None:
                    found[place] = made
            if len(found) == before:
                if not said:
                    announce_fact("waiting for another run on this machine, which trains the other variants")
                said = True
                time.sleep(_LOOK)
        return [found[place] for place in range(len(wanted))]

    def _run(self, variant: Variant, seed: int, part: HeldOutPart | None) -> VariantRun | None:
        """What came of a training; None where another run is at it."""
        experiment, name = variant.with_seed(seed), f"{variant.name}, seed {seed}"
        with beside(self.workspace, experiment) as own:
            try:
                if variant.name in self._refused:
                    raise ObjectiveError(self._refused[variant.name])
                steps = stored_steps(own).on_part(part)
                if (end := finished(steps)) is None:
                    *_, round_ = steps.planned_rounds()
                    if is_trained_now(round_.train_recipe):
                        return None
                    announce_fact(f"variant {name}")
                    self.stages += train_and_evaluate(experiment, name, part)
                    end = steps.after(steps.last())
                return VariantRun(variant.name, seed, end)
            except BusyError:  # it began between the look and the lock
                return None
            except Exception as error:
                if is_interrupt(error) or isinstance(error, CapError):
                    raise
                self.failed += 1
                said = str(error) if isinstance(error, QRPOError) else f"{type(error).__name__}: {error}"
                announce_problem(f"{name} failed, the others go on: {said}")
                return VariantRun(variant.name, seed, None, said)


def refuse_without_result(runs: Sequence[VariantRun]) -> None:
    """Raise QRPOError where every training failed, with the first reason."""
    if all(run.evaluated is None for run in runs):
        raise QRPOError(f"all {len(runs)} trainings failed; the first, {runs[0]}: {runs[0].error}")
