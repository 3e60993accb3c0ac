"""The plan of a run: what it would compute, and why. Reads store and prompt source; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qrpo_core.data.evaluation_prompts import OVERLAP
from qrpo_core.data.unusable import Unusable, count_kinds
from qrpo_core.inspection.reasons import changed
from qrpo_core.inspection.stage_plan import StagePlan
from qrpo_core.maintenance.in_use import steps_of
from qrpo_core.pipeline import policies, prompts, stage_names, usable_rows
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_steps import BlockStep, SampleStep
from qrpo_core.pipeline.sampler_logprobs import rows_to_compare
from qrpo_core.pipeline.truncated import truncation_in_words
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.manifest import BlockManifest
from qrpo_core.store.blocks.planning import RowId, RowRange, Wanted, count_rows
from qrpo_core.store.blocks.retryable import Attempts, count_statuses
from qrpo_core.store.recipe import Recipe

_UNKNOWN = "its policy does not exist yet"
_AGAIN = "if rows that are tried again get a reward"
_AFTER = tuple(name for name in stage_names.STAGES if name.endswith(", after"))


def plan(workspace: Workspace) -> list[StagePlan]:
    """Every stage in order. Bad input raises the same errors as the run."""
    stages: list[StagePlan] = []
    source = policies.source_of(workspace)
    if source.needs_conversion:
        stages.append(_artifact(workspace, stage_names.CONVERT_MODEL, policies.recipe(workspace, source)))
    asked = prompts.recipe(workspace)
    tables = prompts.find(workspace, asked)
    reference = policies.reference(workspace, source)
    used = usable_rows.usable(workspace, asked, tables, reference)
    known = steps_of(workspace, asked, used)
    stages.append(_prompts(workspace, asked, used.left_out.problems, tables.counts))
    stages.append(_artifact(workspace, stage_names.CHECK_ROWS, known.usable_recipe))
    stages += _training(workspace, known)
    stages += [_rows(workspace, step) for step in known.before]
    for each in known.benchmarks:
        for stage, recipe in (
            (stage_names.PREPARE_BENCHMARK, each.prompts_recipe),
            (stage_names.CHECK_BENCHMARK, each.usable_recipe),
        ):
            stages.append(_artifact(workspace, stage_names.of_benchmark(stage, each.name), recipe))
        stages += [_rows(workspace, step) for step in each.before]
    return stages + _after(workspace, known)


def _prompts(
    workspace: Workspace, recipe: Recipe, problems: Sequence[Unusable], counts: Mapping[str, int]
) -> StagePlan:
    """The stage of the prompts, with the rows that it leaves out."""
    stage = _artifact(workspace, stage_names.PREPARE_PROMPTS, recipe)
    kinds = [f"{count} {kind}" for kind, count in count_kinds(problems).items()]
    if unread := counts.get("unreadable_rows"):
        kinds.append(f"{unread} that cannot be read")
    if contradicting := counts.get("contradicting_rows"):
        kinds.append(f"{contradicting} that contradict another row")
    if overlap := counts.get(OVERLAP):
        kinds.append(f"{overlap} also in evaluation.prompts")
    if not kinds:
        return stage
    left = f"left out, prompts.on_unusable: {', '.join(kinds)}"
    return replace(stage, why=f"{stage.why}; {left}" if stage.why else left)


def _training(workspace: Workspace, known: ExperimentSteps) -> Iterator[StagePlan]:
    """The stages of every round, also of rounds whose policy does not exist yet."""
    done = 0
    for round_ in known.planned_rounds():
        done = round_.number
        for step in round_.row_steps:
            yield _rows(workspace, step)
        again = _retries(workspace, round_.row_steps)
        yield _artifact(
            workspace, round_.label(stage_names.COMPUTE_QUANTILES), round_.quantiles_recipe, again
        )
        yield from _logprobs(workspace, round_)
        yield _artifact(
            workspace, round_.label(stage_names.ASSEMBLE_TRAINING_SET), round_.training_set_recipe, again
        )
        trained = _completions(workspace, round_)
        yield replace(
            _artifact(workspace, round_.label(stage_names.TRAIN_POLICY), round_.train_recipe, again),
            passes=workspace.experiment.training.epochs * trained,
            rows_per_prompt=trained / max(1, round_.rewards.completions.prompts.num_rows),
        )
    rounds = workspace.experiment.rounds
    each = rounds.samples_per_prompt
    rows = known.first.rewards.completions.prompts.num_rows * each
    for number in range(done + 1, rounds.count + 1):
        for stage, count in (
            (stage_names.SAMPLE_COMPLETIONS, rows),
            (stage_names.ANNOTATE_COMPLETIONS, rows),
            (stage_names.COMPUTE_QUANTILES, 1),
            (stage_names.SCORE_REFERENCE_LOGPROBS, rows),
            (stage_names.ASSEMBLE_TRAINING_SET, 1),
            (stage_names.TRAIN_POLICY, 1),
        ):
            passes = workspace.experiment.training.epochs * rows if stage == stage_names.TRAIN_POLICY else 0
            label = stage_names.in_round(stage, number)
            yield StagePlan(label, 0, count, _UNKNOWN, passes=passes, rows_per_prompt=each)


def _completions(workspace: Workspace, round_: Round) -> int:
    """How many completions a round trains on; an estimate until they are selected."""
    if rows_to_compare(workspace.experiment, round_.number):  # only those are scored
        return count_rows(round_.rewards.completions.wanted)
    return sum(count_rows(step.wanted) for step in round_.logprob_steps)


def _logprobs(workspace: Workspace, round_: Round) -> Iterator[StagePlan]:
    """The stages of the reference log-probs; with the sampler's only few rows are computed."""
    for step in round_.logprob_steps:
        stage = _rows(workspace, step)
        if rows_to_compare(workspace.experiment, round_.number):
            stage = replace(stage, note="the sampler's log-probs are taken, and compared on these rows")
        yield stage


def _after(workspace: Workspace, known: ExperimentSteps) -> list[StagePlan]:
    """The stages that need the trained policy."""
    *_, last = known.planned_rounds()
    if last.number < workspace.experiment.rounds.count or workspace.artifacts.find(last.train_recipe) is None:
        wanted = known.before.samples.wanted
        each = _per_prompt(wanted)
        stages = [StagePlan(name, 0, count_rows(wanted), _UNKNOWN, rows_per_prompt=each) for name in _AFTER]
        last_stages = [stage_names.EVALUATE_POLICY, stage_names.WRITE_REPORT]
        for tested in known.benchmarks:
            wanted = tested.before.samples.wanted
            each = _per_prompt(wanted)
            for name in (stage_names.SAMPLE_BENCHMARK, stage_names.ANNOTATE_BENCHMARK):
                label = stage_names.of_benchmark(name, tested.name, "after")
                stages.append(StagePlan(label, 0, count_rows(wanted), _UNKNOWN, rows_per_prompt=each))
            last_stages.insert(-1, stage_names.of_benchmark(stage_names.EVALUATE_BENCHMARK, tested.name))
        return stages + [StagePlan(name, 0, 1, _UNKNOWN) for name in last_stages]
    end = known.after(last)
    of_benchmarks = [step for each in end.benchmarks for step in each.after]
    stages = [_rows(workspace, step) for step in (*end.after, *of_benchmarks, *end.divergence)]
    steps = [*known.before, *end.after, *(step for each in known.planned_rounds() for step in each.row_steps)]
    again = _retries(workspace, steps)
    stages.append(_artifact(workspace, stage_names.EVALUATE_POLICY, end.evaluate, again))
    for made in end.benchmarks:
        label = stage_names.of_benchmark(stage_names.EVALUATE_BENCHMARK, made.name)
        retried = _retries(workspace, (*made.before, *made.after))
        stages.append(_artifact(workspace, label, made.result, retried))
        again |= retried
    return [*stages, _artifact(workspace, stage_names.WRITE_REPORT, end.report, again)]


def _retries(workspace: Workspace, steps: Iterable[BlockStep]) -> bool:
    """Whether the run retries rows; results that use them may then change."""
    return any(workspace.blocks.missing(step.recipe, step.wanted).retried for step in steps)


def _artifact(workspace: Workspace, stage: str, recipe: Recipe, again: bool = False) -> StagePlan:
    if workspace.artifacts.find(recipe) is not None:
        return StagePlan(stage, 0, 1, _AGAIN) if again else StagePlan(stage, 1, 0, "")
    others = workspace.artifacts.recipes(recipe.step)
    return StagePlan(stage, 0, 1, changed(workspace.experiment, recipe, others))


def _rows(workspace: Workspace, step: BlockStep) -> StagePlan:
    wanted, committed = step.wanted, workspace.blocks.committed(step.recipe)
    note = _cut(workspace, step, committed)
    left = workspace.blocks.missing(step.recipe, wanted)
    count = left.row_count
    given_up = _with_status("left without a reward after store.tries", left.given_up)
    stage = StagePlan(
        step.label,
        count_rows(wanted) - count,
        0,
        given_up,
        rate=workspace.blocks.measured(step.recipe),
        row_tokens=_mean(committed, lambda block: block.facts.get("tokens")),
        row_bytes=_mean(committed, lambda block: block.bytes),
        rows_per_prompt=count / len({each.key for each in left.ranges}) if count else _per_prompt(wanted),
        note=note,
    )
    if not count:
        return stage
    why = _grown(left.absent, committed)
    if not committed:
        others = workspace.blocks.recipes(step.recipe.step)
        why = changed(workspace.experiment, step.recipe, others, getattr(step, "config", None))
    parts = [why, _with_status("tried again", left.retried), given_up]
    return replace(stage, missing=count, why=", ".join(filter(None, parts)))


def _per_prompt(wanted: Wanted) -> float:
    return count_rows(wanted) / max(1, len(wanted))


def _cut(workspace: Workspace, step: BlockStep, committed: Iterable[BlockManifest]) -> str:
    """How many completions of a step the length limit cut, and what training does with them; "" for none."""
    wanted = step.wanted  # a recipe has training and held-out prompts, in separate blocks
    counted = [
        block
        for block in committed
        if isinstance(block.facts.get("cut"), int) and all(key in wanted for key in block.ranges.keys)
    ]
    cut = sum(int(block.facts["cut"]) for block in counted)
    if not cut or not isinstance(step, SampleStep):
        return ""
    what = f"{cut:,} of {sum(block.rows for block in counted):,} are cut by the length limit"
    held_out = step.prompts["split"].to_pylist()[:1] == ["held_out"]
    return what if held_out else f"{what}, and {truncation_in_words(workspace.experiment)}"


def _with_status(what: str, rows: Mapping[RowId, Attempts]) -> str:
    """`tried again: 8 rows with endpoint_error`; "" for no rows."""
    counts = [f"{count:,} rows with {status}" for status, count in count_statuses(rows).items()]
    return f"{what}: {', '.join(counts)}" if counts else ""


def _grown(missing: Iterable[RowRange], committed: Iterable[BlockManifest]) -> str:
    """How many prompts are new, and how many get more samples."""
    known = {key for block in committed for key in block.ranges.keys}
    keys = {each.key for each in missing}
    more, new = keys & known, keys - known
    parts = [f"{len(new)} prompts without rows"] if new else []
    parts += [f"more samples of {len(more)} prompts"] if more else []
    return ", ".join(parts)


def _mean(committed: Iterable[BlockManifest], amount: Callable[[BlockManifest], int | None]) -> float | None:
    """The mean of an amount over the rows of the blocks that know it; None without one."""
    known = [(block.rows, found) for block in committed if (found := amount(block)) is not None]
    rows = sum(rows for rows, _ in known)
    return sum(found for _, found in known) / rows if rows else None
