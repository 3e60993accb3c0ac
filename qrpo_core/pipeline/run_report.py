"""The HTML report of a finished run: its result, its figures, what was left out, and its lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core import __version__
from qrpo_core.config import Experiment
from qrpo_core.data.unusable import count_kinds
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER
from qrpo_core.pipeline import benchmarks
from qrpo_core.pipeline.evaluation import EvaluationSteps, result_of
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.learning_signal import STATUSES
from qrpo_core.pipeline.rounds import Round, RoundArtifacts
from qrpo_core.pipeline.row_steps import BlockStep
from qrpo_core.pipeline.run_headlines import Finished, headlines
from qrpo_core.pipeline.stage_names import TRAIN_POLICY
from qrpo_core.pipeline.training_targets import TrainingData, derive
from qrpo_core.pipeline.truncated import truncation_in_words
from qrpo_core.pipeline.usable_rows import LeftOut
from qrpo_core.pipeline.workspace import Built, Workspace
from qrpo_core.store.blocks.planning import count_rows
from qrpo_core.store.manifest import Manifest


def build(workspace: Workspace, steps: ExperimentSteps, end: EvaluationSteps) -> Manifest:
    """Commit `report.html`, one self-contained file; returns the artifact."""

    def make(scratch: Path) -> Built:
        from qrpo_core.reporting.html.examples import pick_examples
        from qrpo_core.reporting.html.report import ReportInput, render_report

        rounds = [(each, each.artifacts) for each in steps.rounds()]
        found = workspace.artifacts.get(steps.prompts_recipe)
        evaluated = workspace.artifacts.get(end.evaluate)
        before = workspace.load(evaluated, "before.parquet", EVALUATED)
        after = workspace.load(evaluated, "after.parquet", EVALUATED_AFTER)
        data = derive(workspace, rounds[-1][1].training_set)
        tested = [step for each in end.benchmarks for step in (*each.before, *each.after)]
        held_out = [*steps.before, *end.after, *end.divergence, *tested]
        result, made = result_of(evaluated), [each for _, each in rounds]
        copied = evaluated.facts["drawn"]
        experiment = workspace.given.model_dump(mode="json")
        lines = headlines(Finished(workspace.experiment, found, made, result, copied, steps.reward_problems))
        report = ReportInput(
            experiment=experiment,
            evaluation=result,
            before=before,
            after=after,
            training=_training_rows(data),
            headlines=lines,
            diagnostics=data.diagnostics,
            history=_history(workspace, [each.train for each in made]),
            stages=[
                *(row for pair in rounds for row in _round_costs(workspace, *pair)),
                *(cost(workspace, step) for step in held_out),
            ],
            filtered=[
                *filtered(workspace.experiment, found, made),
                *unusable_rows(steps.tables.left_out),
            ],
            lineage=_lineage(found, rounds, evaluated, held_out),
            examples=pick_examples(before, after, steps.prompts),
            saved=[made.train.facts["saved"] for _, made in rounds],
            drawn=copied,
            benchmarks={
                each.name: benchmarks.result_of(workspace.artifacts.get(each.result))
                for each in end.benchmarks
            },
        )
        facts = {"headlines": [str(each) for each in lines]} | workspace.settings_facts
        return {"report.html": render_report(report).encode()}, facts

    return workspace.make(end.report, make)


def cost(workspace: Workspace, step: BlockStep) -> dict[str, Any]:
    """The cost of a step's rows, from their blocks, whichever run computed them."""
    wanted = step.wanted
    blocks = [
        b
        for b in workspace.blocks.committed(step.recipe)
        if any(row_range.key in wanted for row_range in b.ranges)
    ]
    tokens = sum(int(block.facts.get("tokens", 0)) for block in blocks)
    seconds = sum(block.seconds for block in blocks)
    notes = [f"{tokens / seconds:,.0f} tokens/s"] if tokens and seconds else []
    notes += sorted({str(block.facts["engine"]) for block in blocks if "engine" in block.facts})
    if any(block.facts.get("exact") is False for block in blocks):
        notes.append("drawn again, rows would differ: this engine's depend on what is computed beside them")
    return {
        "stage": step.label,
        "rows": count_rows(wanted),
        "blocks": len(blocks),
        "seconds": seconds,
        "note": ", ".join(notes),
    }


def _round_costs(workspace: Workspace, round_: Round, made: RoundArtifacts) -> Iterator[dict[str, Any]]:
    for step in (*round_.row_steps, *round_.logprob_steps):
        yield cost(workspace, step)
    yield {
        "stage": round_.label(TRAIN_POLICY),
        "rows": made.train.facts["rows"],
        "blocks": 1,
        "seconds": made.train.seconds,
        "note": f"{made.train.facts['steps']} steps",
    }


def _history(workspace: Workspace, trained: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The trainer's logs of all rounds as one, with step numbers that continue from round to round."""
    entries: list[dict[str, Any]] = []
    for manifest in trained:
        before = entries[-1]["step"] if entries else 0
        for entry in json.loads(workspace.artifacts.read(manifest, "history.json")):
            entries.append({**entry, "step": before + entry["step"]})
    return entries


#: What happened to rows of the source, by its name in `PromptSet.counts`: the line's text, and the reason.
_SOURCE = {
    "unreadable_rows": ("source rows left out", "they cannot be read; prompts.on_unusable"),
    "contradicting_rows": ("source rows left out", "they contradict an earlier one; prompts.on_unusable"),
    "without_ground_truth": ("source rows without a ground truth", "null in the data set"),
    "without_pair": ("source rows without a pair", "null in the data set"),
    "without_completions": ("source rows without completions", "null or an empty list in the data set"),
    "ungraded_completions": ("completions without a grade", "null or N/A in the data set"),
    "empty_completions": ("empty completions of the data set", "kept"),
    "equal_pairs": ("pairs of one text with itself", "kept"),
    "repeated_pairs": ("repeated pairs of a prompt", "taken once"),
    "repeated_completions": ("repeated completions of a prompt", "taken once"),
    "equal_but_for_space": (
        "prompts equal to another but for white space",
        "kept; they may stand on both sides of the split",
    ),
    "ignored_message_keys": ("keys of messages set aside", "only role and content are read"),
}
#: Places of overlapping prompts that the table names.
_PLACES = 5

#: What selection leaves out, by fact of the rank counts: the line's text, and the reason.
_SELECTION = {
    "tied_pairs": (
        "pairs with equal rewards",
        "neither side is better, so a baseline learns nothing from them",
    ),
    "unpaired_rows": (
        "completions without a partner",
        "the other one of its pair has no reward, or is left out",
    ),
    "pairs_with_an_unscored_side": ("pairs with an unscored side", "both need a reward"),
    "label_contradicts_reward": ("pairs whose label contradicts the reward", "the reward decides"),
}


def filtered(
    experiment: Experiment, prompts: Manifest, rounds: Sequence[RoundArtifacts]
) -> list[dict[str, Any]]:
    """Rows of the report's table of everything left out, merged or not scored, zeros included."""
    counts = prompts.facts["counts"]
    rows = [
        _left("source rows merged", counts["merged"], "the same conversation as an earlier row"),
        _left("source rows not taken", counts["filtered"], "prompts.limit"),
    ]
    rows += [_left(what, counts[name], why) for name, (what, why) in _SOURCE.items() if name in counts]
    if overlap := prompts.facts.get("overlap"):
        shown = ", ".join(overlap[:_PLACES]) + (", ..." if len(overlap) > _PLACES else "")
        rows.append(_left("prompts not trained on", len(overlap), f"also in evaluation.prompts: {shown}"))
    for number, made in enumerate(rounds, 1):
        where = "" if number == 1 else f", round {number}"
        rows += [_left(what + where, count, why) for what, count, why in _left_out(experiment, made)]
    return rows


def unusable_rows(left_out: LeftOut) -> list[dict[str, Any]]:
    """The row of that table for unusable prompts and completions; [] if there are none."""
    if not left_out.problems:
        return []
    rows = {(each.prompt_id, each.sample_index) for each in left_out.problems}
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_kinds(left_out.problems).items())
    return [_left("rows left out as unusable", len(rows), f"{kinds}; prompts.on_unusable")]


def _left_out(experiment: Experiment, made: RoundArtifacts) -> Iterator[tuple[str, int, str]]:
    facts = made.quantiles.facts
    for key, name in STATUSES.items():
        found = facts.get(key, {})
        statuses = {status: each["count"] for status, each in found.items()}
        failed = {status: count for status, count in statuses.items() if status != "ok"}
        for status, count in failed.items():
            yield f"{name} with status {status}", count, "not in any quantile"
            if detail := found[status]["detail"]:
                yield f"{status}, what it says most often", found[status]["times"], detail
        if statuses and not failed:
            yield f"{name} without a reward", 0, "every one was scored"
    for fact, (what, why) in _SELECTION.items():
        if fact in facts:
            yield what, facts[fact], why
    few = made.train.facts["diagnostics"].get("prompts_with_too_few_references", 0)
    yield "training prompts left out", facts["prompts_left_out"] + few, "too few scored completions"
    for name, count in facts["cut"].items():
        yield f"{name} cut by the length limit", count["cut"], truncation_in_words(experiment)


def _left(what: str, count: int, why: str) -> dict[str, Any]:
    return {"what": what, "count": count, "why": why}


def _training_rows(data: TrainingData) -> pa.Table:
    """Rewards, lengths, quantiles and targets of the training rows; an empty table without targets."""
    names = ("prompt_id", "sample_index", "reward")
    table = data.table.select(names)
    lengths = pc.list_value_length(data.table["token_ids"]).cast(pa.int64())
    if data.targets is None:
        table = table.slice(0, 0)
        nothing = pa.array([], pa.float64())
        columns = dict.fromkeys(("quantile", "target", "log_ratio_target"), nothing)
    else:
        targets = data.targets
        columns = {
            "quantile": pa.array(targets.quantile),
            "target": pa.array(targets.target),
            "log_ratio_target": pa.array(targets.log_ratio),
        }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table.append_column("num_tokens", lengths.slice(0, len(table)))


def _lineage(
    prompts: Manifest,
    rounds: Sequence[tuple[Round, RoundArtifacts]],
    evaluated: Manifest,
    steps: Sequence[BlockStep],
) -> dict[str, str]:
    keys = {"prompts": f"artifacts/{prompts.step}/{prompts.key}"}
    for round_, made in rounds:
        for step in (*round_.row_steps, *round_.logprob_steps):
            keys[step.label] = step.recipe.blocks_path
        for manifest in (made.quantiles, made.training_set, made.train):
            keys[round_.label(manifest.step)] = f"artifacts/{manifest.step}/{manifest.key}"
    keys |= {step.label: step.recipe.blocks_path for step in steps}
    keys["evaluate"] = f"artifacts/{evaluated.step}/{evaluated.key}"
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return keys | {"qrpo": __version__} | packages
