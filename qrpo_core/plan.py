"""What a run would compute, and why, before anything runs. Reads store and prompt source; writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qrpo_core.data.unusable import Unusable, count_kinds
from qrpo_core.errors import MissingError
from qrpo_core.steps import policies, prompts, usable
from qrpo_core.steps.blocks import BlockStep, SampleStep
from qrpo_core.steps.chain import Chain, chain
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.truncated import treated
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockManifest, Pair, Run, Tried, count_rows, count_statuses
from qrpo_core.store.recipe import Recipe

_UNKNOWN = "its policy does not exist yet"
_AGAIN = "if rows that are tried again get a reward"
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
    why : why the missing ones are missing, and what stays without a reward or is left out.
    seconds : expected, from this store's measured rates; None where there is no measurement.
    tokens : expected for the missing rows, from the mean of those that the store has (sampling: drawn tokens;
        log-probs: prompt and completion); None where there is no measurement or no tokens are counted.
    note : what is known of the rows that are there and matters for what follows; empty when nothing does.
    """

    stage: str
    present: int
    missing: int
    why: str
    seconds: float | None = None
    tokens: float | None = None
    note: str = ""


def plan(workspace: Workspace) -> list[StagePlan]:
    """Every stage in order. Bad input raises the same errors as the run itself would."""
    stages: list[StagePlan] = []
    source = policies.source_of(workspace)
    if source.needs_materialising:
        stages.append(_artifact(workspace, "convert model", policies.recipe(workspace, source)))
    asked = prompts.recipe(workspace)
    tables = prompts.find(workspace, asked)
    reference = policies.reference(workspace, source)
    used = usable.usable(workspace, asked, tables, reference)
    if reference is None:
        # Which policy it will be decides names, not numbers: with none, every row is missing.
        reference = Policy("not converted yet", _not_there)
    known = chain(workspace, reference, asked, used)
    stages.append(_prompts(workspace, asked, used.left_out.problems, tables.counts))
    stages.append(_artifact(workspace, "check rows", known.usable))
    stages += _training(workspace, known)
    stages += [_rows(workspace, step) for step in known.before]
    return stages + _after(workspace, known)


def _prompts(
    workspace: Workspace, recipe: Recipe, problems: Sequence[Unusable], counts: Mapping[str, int]
) -> StagePlan:
    """The prompts, with what is left out of them."""
    stage = _artifact(workspace, "prompts", recipe)
    kinds = [f"{count} {kind}" for kind, count in count_kinds(problems).items()]
    if unread := counts.get("unreadable_rows"):
        kinds.append(f"{unread} that cannot be read")
    if contradicting := counts.get("contradicting_rows"):
        kinds.append(f"{contradicting} that contradict another row")
    if not kinds:
        return stage
    left = f"left out, prompts.on_unusable: {', '.join(kinds)}"
    return replace(stage, why=f"{stage.why}; {left}" if stage.why else left)


def _not_there() -> Path:
    raise MissingError("the model is not converted yet", remedy="run precompute first")


def _training(workspace: Workspace, known: Chain) -> Iterator[StagePlan]:
    """Every round, also those whose policy does not exist yet."""
    done = 0
    for round_ in known.planned_rounds():
        done = round_.number
        for step in round_.row_steps:
            yield _rows(workspace, step)
        again = _tried_again(workspace, round_.row_steps)
        yield _artifact(workspace, round_.label("quantiles"), round_.quantiles, again)
        yield _rows(workspace, round_.logprobs)
        yield _artifact(workspace, round_.label("training set"), round_.training_set, again)
        yield _artifact(workspace, round_.label("train"), round_.train, again)
    rounds = workspace.experiment.rounds
    rows = known.first.rewards.completions.prompts.num_rows * rounds.samples_per_prompt
    for number in range(done + 1, rounds.count + 1):
        for stage, count in (("sample", rows), ("score", rows), ("reference log-probs", rows)):
            yield StagePlan(f"{stage}, round {number}", 0, count, _UNKNOWN)
        for stage in ("quantiles", "training set", "train"):
            yield StagePlan(f"{stage}, round {number}", 0, 1, _UNKNOWN)


def _after(workspace: Workspace, known: Chain) -> list[StagePlan]:
    """The stages that need the trained policy."""
    *_, last = known.planned_rounds()
    if last.number < workspace.experiment.rounds.count or workspace.artifacts.find(last.train) is None:
        rows = count_rows(known.before.samples.wanted)
        stages = [StagePlan(name, 0, rows, _UNKNOWN) for name in _AFTER]
        return [*stages, StagePlan("evaluate", 0, 1, _UNKNOWN), StagePlan("report", 0, 1, _UNKNOWN)]
    end = known.after(last)
    stages = [_rows(workspace, step) for step in (*end.after, *end.divergence)]
    steps = [*known.before, *end.after, *(step for each in known.planned_rounds() for step in each.row_steps)]
    again = _tried_again(workspace, steps)
    return stages + [
        _artifact(workspace, name, each, again)
        for name, each in (("evaluate", end.evaluate), ("report", end.report))
    ]


def _tried_again(workspace: Workspace, steps: Iterable[BlockStep]) -> bool:
    """Whether rows that can get another status are asked for again: what is made of them may change."""
    return any(workspace.blocks.lacking(step.recipe, step.wanted).again for step in steps)


def _artifact(workspace: Workspace, stage: str, recipe: Recipe, again: bool = False) -> StagePlan:
    if workspace.artifacts.find(recipe) is not None:
        return StagePlan(stage, 0, 1, _AGAIN) if again else StagePlan(stage, 1, 0, "")
    others = workspace.artifacts.recipes(recipe.step)
    return StagePlan(stage, 0, 1, _changed(recipe, others))


def _rows(workspace: Workspace, step: BlockStep) -> StagePlan:
    wanted, committed = step.wanted, workspace.blocks.committed(step.recipe)
    note = _cut(workspace, step, committed)
    left = workspace.blocks.lacking(step.recipe, wanted)
    asked, count = count_rows(wanted), left.rows
    given_up = _with_status("left without a reward after store.tries", left.given_up)
    if not count:
        return StagePlan(step.label, asked, 0, given_up, 0.0, note=note)
    why = _grown(left.absent, committed)
    if not committed:
        why = _changed(step.recipe, workspace.blocks.recipes(step.recipe.step))
    parts = [why, _with_status("tried again", left.again), given_up]
    rate = workspace.blocks.rate(step.recipe)
    seconds = None if rate is None else count / rate
    tokens = _tokens(committed, count)
    whole = ", ".join(filter(None, parts))
    return StagePlan(step.label, asked - count, count, whole, seconds, tokens, note)


def _cut(workspace: Workspace, step: BlockStep, committed: Iterable[BlockManifest]) -> str:
    """How many of a step's completions the length limit cut, and what training makes of them; "" for none."""
    wanted = step.wanted  # a recipe holds training and held-out prompts, in blocks of their own
    counted = [
        block
        for block in committed
        if isinstance(block.facts.get("cut"), int) and all(run.key in wanted for run in block.runs)
    ]
    cut = sum(int(block.facts["cut"]) for block in counted)
    if not cut or not isinstance(step, SampleStep):
        return ""
    what = f"{cut:,} of {sum(block.rows for block in counted):,} are cut by the length limit"
    held_out = step.prompts["split"].to_pylist()[:1] == ["held_out"]
    return what if held_out else f"{what}, and {treated(workspace.experiment)}"


def _with_status(what: str, rows: Mapping[Pair, Tried]) -> str:
    """`tried again: 8 rows with endpoint_error`; "" for no rows."""
    counts = [f"{count:,} rows with {status}" for status, count in count_statuses(rows).items()]
    return f"{what}: {', '.join(counts)}" if counts else ""


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


def _tokens(committed: Iterable[BlockManifest], rows: int) -> float | None:
    """Tokens of so many rows by the mean of the committed ones; None where their blocks count none."""
    counted = [block for block in committed if "tokens" in block.facts]
    held = sum(block.rows for block in counted)
    return rows * sum(int(block.facts["tokens"]) for block in counted) / held if held else None
