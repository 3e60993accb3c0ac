"""Evaluation: the trained policy beside the reference on held-out prompts, and the report of all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core import __version__
from qrpo_core.config import Experiment, recipe_fields
from qrpo_core.data.unusable import count_kinds
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER, EvaluationInput
from qrpo_core.evaluation.metrics import EvaluationResult, evaluate_policies
from qrpo_core.records import COMPLETIONS, LOGPROBS
from qrpo_core.steps import drawn
from qrpo_core.steps.blocks import BlockStep, RewardStep
from qrpo_core.steps.headlines import Finished, headlines
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.targets import TrainingData, derive
from qrpo_core.steps.truncated import treated
from qrpo_core.steps.usable import LeftOut
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.blocks import count_rows
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.steps.chain import Chain, EvaluationChain
    from qrpo_core.steps.rounds import Made, Round

VERSION = 3
REPORT_VERSION = 4


def recipe(
    workspace: Workspace,
    inputs: Mapping[str, Recipe],
    unsettled: Mapping[str, str] | None = None,
    left_out: str = "",
) -> Recipe:
    """Decided by the prompts, both policies' rewards, and the log-probs of the trained policy's samples.

    unsettled : by side and judge what names the rows whose status can still pass. left_out : names the
    held-out prompts that are left out.
    """
    keys = {name: each.key for name, each in inputs.items()}
    config = recipe_fields(workspace.experiment.evaluation)
    if found := {name: digest for name, digest in (unsettled or {}).items() if digest}:
        config["unsettled"] = found
    if left_out:
        config["left_out"] = left_out
    return Recipe("evaluate", VERSION, config, keys)


def build(workspace: Workspace, chain: Chain, end: EvaluationChain) -> Manifest:
    """Commit `evaluation.json`, and the rows it was made of: `before.parquet` and `after.parquet`."""

    def make(scratch: Path) -> Built:
        sampling = workspace.experiment.sampling
        rows_after = _evaluated(workspace, end.after.rewards)
        for name, step in (
            ("policy_logprob", end.divergence.policy),
            ("ref_logprob", end.divergence.reference),
        ):
            scored = workspace.blocks.read(step.recipe, step.wanted, LOGPROBS)
            rows_after = rows_after.append_column(name, scored["logprob"])
        rows_before = _evaluated(workspace, chain.before.rewards)
        data = EvaluationInput(rows_before, rows_after, sampling.temperature, sampling.top_p)
        judged = {
            name: tuple(_evaluated(workspace, side.judges[name]) for side in (chain.before, end.after))
            for name in workspace.experiment.evaluation.judges
        }
        result = evaluate_policies(data, workspace.experiment.evaluation, judged)
        files: dict[str, Path | bytes] = {
            "evaluation.json": json.dumps(result.to_dict()).encode(),
            "before.parquet": to_bytes(data.before, EVALUATED, "evaluation, before"),
            "after.parquet": to_bytes(data.after, EVALUATED_AFTER, "evaluation, after"),
        }
        return files, {"result": result.to_dict(), "drawn": _drawn(end)}

    return workspace.make(end.evaluate, make)


def _drawn(end: EvaluationChain) -> dict[str, Any] | None:
    """Facts of what the trained policy's samples were drawn from; measured now if they never were."""
    copied = drawn.drawn_copy(end.after.samples)
    return None if copied is None else copied.build().facts


def result_of(manifest: Manifest) -> EvaluationResult:
    """The evaluation that an artifact holds."""
    return EvaluationResult.from_dict(manifest.facts["result"], f"evaluate/{manifest.key}")


def _evaluated(workspace: Workspace, rewards: RewardStep) -> pa.Table:
    # Both reads come in the order of the same prompts and indices, each row once.
    drawn = rewards.completions
    completions = workspace.blocks.read(drawn.recipe, drawn.wanted, COMPLETIONS)
    scores = rewards.read()
    if not completions.select(["prompt_id", "sample_index"]).equals(
        scores.select(["prompt_id", "sample_index"])
    ):
        raise AssertionError("completions and rewards of one step are not aligned")
    joined = completions.append_column("reward", scores["reward"]).append_column("status", scores["status"])
    return joined.select(EVALUATED.names)


def report_recipe(workspace: Workspace, evaluation: Recipe, train: Recipe) -> Recipe:
    """Decided by what it shows; the experiment's name stands in the title."""
    inputs = {"evaluate": evaluation.key, "train": train.key}
    experiment = workspace.experiment
    config = {"name": experiment.name, "truncated_warning": experiment.training_data.truncated_warning}
    return Recipe("report", REPORT_VERSION, config, inputs)


def build_report(workspace: Workspace, chain: Chain, end: EvaluationChain) -> Manifest:
    """Commit `report.html`: one self-contained file with the result, its figures and its lineage."""

    def make(scratch: Path) -> Built:
        from qrpo_core.evaluation.report import ReportInput, pick_examples, render_report

        rounds = [(each, each.made) for each in chain.rounds()]
        found = workspace.artifacts.get(chain.prompts)
        evaluated = workspace.artifacts.get(end.evaluate)
        before = load(workspace, evaluated, "before.parquet", EVALUATED)
        after = load(workspace, evaluated, "after.parquet", EVALUATED_AFTER)
        data = derive(workspace, rounds[-1][1].training_set)
        steps = [*chain.before, *end.after, *end.divergence]
        result, made = result_of(evaluated), [each for _, each in rounds]
        copied = evaluated.facts["drawn"]
        report = ReportInput(
            experiment=workspace.experiment.model_dump(mode="json"),
            evaluation=result,
            before=before,
            after=after,
            training=_training_rows(data),
            headlines=headlines(Finished(workspace.experiment, found, made, result, copied, chain.doubts)),
            diagnostics=data.diagnostics,
            history=_history(workspace, [each.train for each in made]),
            stages=[
                *(row for pair in rounds for row in _round_costs(workspace, *pair)),
                *(cost(workspace, step) for step in steps),
            ],
            filtered=[
                *filtered(workspace.experiment, found, made),
                *unusable_rows(chain.found.left_out),
            ],
            lineage=_lineage(found, rounds, evaluated, steps),
            examples=pick_examples(before, after, chain.table),
            saved=[made.train.facts["saved"] for _, made in rounds],
            drawn=copied,
        )
        return {"report.html": render_report(report).encode()}, {}

    return workspace.make(end.report, make)


def cost(workspace: Workspace, step: BlockStep) -> dict[str, Any]:
    """What the rows that a step is asked for took to compute, from their blocks; whichever run paid."""
    wanted = step.wanted
    blocks = [b for b in workspace.blocks.committed(step.recipe) if any(run.key in wanted for run in b.runs)]
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


def _round_costs(workspace: Workspace, round_: Round, made: Made) -> Iterator[dict[str, Any]]:
    for step in (*round_.row_steps, round_.logprobs):
        yield cost(workspace, step)
    yield {
        "stage": round_.label("train"),
        "rows": made.train.facts["rows"],
        "blocks": 1,
        "seconds": made.train.seconds,
        "note": f"{made.train.facts['steps']} steps",
    }


def _history(workspace: Workspace, trained: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The trainer's log of every round, its steps numbered on."""
    entries: list[dict[str, Any]] = []
    for manifest in trained:
        before = entries[-1]["step"] if entries else 0
        for entry in json.loads(workspace.artifacts.read(manifest, "history.json")):
            entries.append({**entry, "step": before + entry["step"]})
    return entries


#: What selection may leave out, and why; zeros of what cannot occur in a mode are not listed.
#: What happened to rows of the source, where it did: see `PromptSet.counts`.
_SOURCE = {
    "unreadable_rows": ("source rows left out", "they cannot be read; prompts.on_unusable"),
    "contradicting_rows": ("source rows left out", "they contradict an earlier one; prompts.on_unusable"),
    "without_reference": ("source rows without a reference", "null in the data set"),
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


def filtered(experiment: Experiment, prompts: Manifest, rounds: Sequence[Made]) -> list[dict[str, Any]]:
    """Everything that was left out, merged or not scored, with counts; zeros are kept and shown."""
    counts = prompts.facts["counts"]
    rows = [
        _left("source rows merged", counts["merged"], "the same conversation as an earlier row"),
        _left("source rows not taken", counts["filtered"], "prompts.limit"),
    ]
    rows += [_left(what, counts[name], why) for name, (what, why) in _SOURCE.items() if name in counts]
    for number, made in enumerate(rounds, 1):
        where = "" if number == 1 else f", round {number}"
        rows += [_left(what + where, count, why) for what, count, why in _left_out(experiment, made)]
    return rows


def unusable_rows(left_out: LeftOut) -> list[dict[str, Any]]:
    """The prompts and completions that are left out because they cannot be used, as a row of that table."""
    if not left_out.problems:
        return []
    rows = {(each.prompt_id, each.sample_index) for each in left_out.problems}
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_kinds(left_out.problems).items())
    return [_left("rows left out as unusable", len(rows), f"{kinds}; prompts.on_unusable")]


def _left_out(experiment: Experiment, made: Made) -> Iterator[tuple[str, int, str]]:
    facts = made.quantiles.facts
    for name, key in (("completions", "statuses"), ("references", "reference_statuses")):
        found = facts.get(key, {})
        statuses = {status: each["count"] for status, each in found.items()}
        failed = {status: count for status, count in statuses.items() if status != "ok"}
        for status, count in failed.items():
            yield f"training {name} with status {status}", count, "not in any quantile"
            if detail := found[status]["detail"]:
                yield f"{status}, what it says most often", found[status]["times"], detail
        if statuses and not failed:
            yield f"training {name} without a reward", 0, "every one was scored"
    for fact, (what, why) in _SELECTION.items():
        if fact in facts:
            yield what, facts[fact], why
    few = made.train.facts["diagnostics"].get("prompts_with_too_few_references", 0)
    yield "training prompts left out", facts["prompts_left_out"] + few, "too few scored completions"
    for name, count in facts["cut"].items():
        yield f"{name} cut by the length limit", count["cut"], treated(experiment)


def _left(what: str, count: int, why: str) -> dict[str, Any]:
    return {"what": what, "count": count, "why": why}


def _training_rows(data: TrainingData) -> pa.Table:
    """Rewards and lengths, and where there are targets, what they are."""
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
    rounds: Sequence[tuple[Round, Made]],
    evaluated: Manifest,
    steps: Sequence[BlockStep],
) -> dict[str, str]:
    keys = {"prompts": f"artifacts/{prompts.step}/{prompts.key}"}
    for round_, made in rounds:
        for step in (*round_.row_steps, round_.logprobs):
            keys[step.label] = step.recipe.blocks_path
        for manifest in (made.quantiles, made.training_set, made.train):
            keys[round_.label(manifest.step)] = f"artifacts/{manifest.step}/{manifest.key}"
    keys |= {step.label: step.recipe.blocks_path for step in steps}
    keys["evaluate"] = f"artifacts/{evaluated.step}/{evaluated.key}"
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return keys | {"qrpo": __version__} | packages
