"""What a run would compute, and why, before anything runs. Reads store and prompt source; writes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from qrpo_core.records import PROMPTS
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.blocks import BlockStep
from qrpo_core.steps.chain import Chain, chain
from qrpo_core.steps.tables import load
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockManifest, Run, missing_runs
from qrpo_core.store.recipe import Recipe

_UNKNOWN = "its policy does not exist yet"
_AFTER = (
    "sample held-out, after",
    "score held-out, after",
    "policy log-probs, after",
    "reference log-probs, after",
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    present, missing : rows (or 1 artifact) that the store has and that would be computed.
    why : why the missing ones are missing; empty when nothing is.
    seconds : expected, from this store's measured rates; None where there is no measurement.
    """

    stage: str
    present: int
    missing: int
    why: str
    seconds: float | None = None


def plan(workspace: Workspace) -> list[StagePlan]:
    """Every stage in order. Bad input raises the same errors as the run itself would."""
    stages: list[StagePlan] = []
    source = policies.source_of(workspace)
    if source.needs_materialising:
        stages.append(_artifact(workspace, "convert model", policies.recipe(workspace, source)))
    prompt_recipe = prompts.recipe(workspace)
    table = prompt_table(workspace, prompt_recipe)
    stages.append(_artifact(workspace, "prompts", prompt_recipe))
    reference = policies.reference(workspace, source)
    if reference is None:
        return stages + _unseen(workspace, table)
    known = chain(workspace, reference, prompt_recipe, table)
    stages += [_rows(workspace, step) for step in known.training]
    recipes = [("quantiles", known.quantiles), ("training set", known.training_set), ("train", known.train)]
    stages += [_artifact(workspace, name, recipe) for name, recipe in recipes]
    stages += [_rows(workspace, step) for step in known.before]
    return stages + _after(workspace, known)


def prompt_table(workspace: Workspace, recipe: Recipe) -> pa.Table:
    """The prompts, from the store if it has them, else read from the source."""
    manifest = workspace.artifacts.find(recipe)
    if manifest is not None:
        return load(workspace, manifest, "prompts.parquet", PROMPTS)
    return prompts.read(workspace).prompts


def _after(workspace: Workspace, known: Chain) -> list[StagePlan]:
    """The stages that need the trained policy."""
    manifest = workspace.artifacts.find(known.train)
    if manifest is None:
        rows = sum(known.before.samples.wanted.values())
        stages = [StagePlan(name, 0, rows, _UNKNOWN) for name in _AFTER]
        return [*stages, StagePlan("evaluate", 0, 1, _UNKNOWN), StagePlan("report", 0, 1, _UNKNOWN)]
    end = known.after(policies.stored(workspace, manifest))
    stages = [_rows(workspace, step) for step in (*end.after, *end.divergence)]
    return stages + [
        _artifact(workspace, name, each)
        for name, each in (("evaluate", end.evaluate), ("report", end.report))
    ]


def _unseen(workspace: Workspace, table: pa.Table) -> list[StagePlan]:
    """Every later stage of a store that does not have the reference policy yet."""
    experiment = workspace.experiment
    train = prompts.of_split(table, "train").num_rows * experiment.sampling.references_per_prompt
    held_out = prompts.of_split(table, "held_out").num_rows * experiment.evaluation.samples_per_prompt
    rows = [("sample references", train), ("score references", train), ("reference log-probs", train)]
    rows += [("quantiles", 1), ("training set", 1), ("train", 1)]
    rows += [(name, held_out) for name in ("sample held-out, before", "score held-out, before", *_AFTER)]
    rows += [("evaluate", 1), ("report", 1)]
    return [StagePlan(name, 0, count, "the model is not converted yet") for name, count in rows]


def _artifact(workspace: Workspace, stage: str, recipe: Recipe) -> StagePlan:
    if workspace.artifacts.find(recipe) is not None:
        return StagePlan(stage, 1, 0, "")
    others = workspace.artifacts.recipes(recipe.step)
    return StagePlan(stage, 0, 1, _changed(recipe, others))


def _rows(workspace: Workspace, step: BlockStep) -> StagePlan:
    wanted, committed = step.wanted, workspace.blocks.committed(step.recipe)
    missing = missing_runs(wanted, committed)
    count = sum(run.count for run in missing)
    if not count:
        return StagePlan(step.label, sum(wanted.values()), 0, "", 0.0)
    why = (
        _grown(missing, committed)
        if committed
        else _changed(step.recipe, workspace.blocks.recipes(step.recipe.step))
    )
    return StagePlan(
        step.label, sum(wanted.values()) - count, count, why, _expected(workspace, step.recipe.step, count)
    )


def _grown(missing: Iterable[Run], committed: Iterable[BlockManifest]) -> str:
    """New prompts, more samples of known ones, or rows that an interrupted run left."""
    known = {run.key for block in committed for run in block.runs}
    more = {run.key for run in missing if run.key in known}
    new = {run.key for run in missing} - more
    parts = [f"{len(new)} prompts without rows"] * bool(new) + [
        f"more samples of {len(more)} prompts"
    ] * bool(more)
    return ", ".join(parts)


def _changed(recipe: Recipe, others: list[dict[str, object]]) -> str:
    """Which fields set this recipe apart from the nearest one that the store has."""
    differences = sorted(
        (recipe.differences(other) for other in others if other != recipe.to_dict()), key=len
    )
    if not differences:
        return "not computed yet"
    return f"changed: {', '.join(differences[0][:4])}" + (", ..." if len(differences[0]) > 4 else "")


def _expected(workspace: Workspace, step: str, rows: int) -> float | None:
    """Seconds for so many rows at the rate of the blocks of this step that the store has."""
    rates = workspace.blocks.rate(step)
    return None if rates is None else rows / rates
