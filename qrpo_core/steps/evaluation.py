"""Evaluation: the trained policy beside the reference on held-out prompts, and the report of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qrpo_core import __version__
from qrpo_core.config import recipe_fields
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER, EvaluationInput
from qrpo_core.evaluation.metrics import EvaluationResult, evaluate_policies
from qrpo_core.records import COMPLETIONS, LOGPROBS, REWARDS
from qrpo_core.steps.blocks import BlockStep, RewardStep
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.training_set import TrainingData, derive
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.steps.chain import Chain, EvaluationChain

VERSION = 1
REPORT_VERSION = 1


def recipe(workspace: Workspace, inputs: Mapping[str, Recipe]) -> Recipe:
    """Decided by the prompts, both policies' rewards, and the log-probs of the trained policy's samples."""
    keys = {name: each.key for name, each in inputs.items()}
    return Recipe("evaluate", VERSION, recipe_fields(workspace.experiment.evaluation), keys)


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
        result = evaluate_policies(data, workspace.experiment.evaluation)
        files: dict[str, Path | bytes] = {
            "evaluation.json": json.dumps(result.to_dict()).encode(),
            "before.parquet": to_bytes(data.before, EVALUATED, "evaluation, before"),
            "after.parquet": to_bytes(data.after, EVALUATED_AFTER, "evaluation, after"),
        }
        return files, {"result": result.to_dict()}

    return workspace.make(end.evaluate, make)


def result_of(manifest: Manifest) -> EvaluationResult:
    """The evaluation that an artifact holds."""
    return EvaluationResult.from_dict(manifest.facts["result"], f"evaluate/{manifest.key}")


def _evaluated(workspace: Workspace, rewards: RewardStep) -> pa.Table:
    # Both reads come in the order of the same prompts and indices, each row once.
    samples = rewards.samples
    completions = workspace.blocks.read(samples.recipe, samples.wanted, COMPLETIONS)
    scores = workspace.blocks.read(rewards.recipe, rewards.wanted, REWARDS)
    if not completions.select(["prompt_id", "sample_index"]).equals(
        scores.select(["prompt_id", "sample_index"])
    ):
        raise AssertionError("completions and rewards of one step are not aligned")
    joined = completions.append_column("reward", scores["reward"]).append_column("status", scores["status"])
    return joined.select(EVALUATED.names)


def report_recipe(workspace: Workspace, evaluation: Recipe, train: Recipe) -> Recipe:
    """Decided by what it shows; the experiment's name stands in the title."""
    inputs = {"evaluate": evaluation.key, "train": train.key}
    return Recipe("report", REPORT_VERSION, {"name": workspace.experiment.name}, inputs)


def build_report(workspace: Workspace, chain: Chain, end: EvaluationChain) -> Manifest:
    """Commit `report.html`: one self-contained file with the result, its figures and its lineage."""

    def make(scratch: Path) -> Built:
        from qrpo_core.evaluation.report import ReportInput, pick_examples, render_report

        recipes = {
            "prompts": chain.prompts,
            "quantiles": chain.quantiles,
            "training_set": chain.training_set,
            "train": chain.train,
            "evaluate": end.evaluate,
        }
        made = {name: workspace.artifacts.get(recipe) for name, recipe in recipes.items()}
        steps = [*chain.training, *chain.before, *end.after, *end.divergence]
        before = load(workspace, made["evaluate"], "before.parquet", EVALUATED)
        after = load(workspace, made["evaluate"], "after.parquet", EVALUATED_AFTER)
        data = derive(workspace, made["training_set"])
        report = ReportInput(
            experiment=workspace.experiment.model_dump(mode="json"),
            evaluation=result_of(made["evaluate"]),
            before=before,
            after=after,
            training=_training_rows(data),
            diagnostics=data.diagnostics,
            history=json.loads(workspace.artifacts.read(made["train"], "history.json")),
            stages=[*(cost(workspace, step) for step in steps), _training_cost(made["train"])],
            filtered=filtered(made),
            lineage=_lineage(made, steps),
            examples=pick_examples(before, after, chain.table),
        )
        return {"report.html": render_report(report).encode()}, {}

    return workspace.make(end.report, make)


def cost(workspace: Workspace, step: BlockStep) -> dict[str, Any]:
    """What the rows that a step is asked for took to compute, from their blocks; whichever run paid."""
    wanted = step.wanted
    blocks = [b for b in workspace.blocks.committed(step.recipe) if any(run.key in wanted for run in b.runs)]
    tokens = sum(int(block.facts.get("tokens", 0)) for block in blocks)
    seconds = sum(block.seconds for block in blocks)
    note = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""
    return {
        "stage": step.label,
        "rows": sum(wanted.values()),
        "blocks": len(blocks),
        "seconds": seconds,
        "note": note,
    }


def _training_cost(train: Manifest) -> dict[str, Any]:
    note = f"{train.facts['steps']} steps"
    return {
        "stage": "train",
        "rows": train.facts["rows"],
        "blocks": 1,
        "seconds": train.seconds,
        "note": note,
    }


def filtered(artifacts: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """Everything that was left out, merged or not scored, with counts; zeros are kept and shown."""
    prompts, quantiles = artifacts["prompts"].facts, artifacts["quantiles"].facts
    counts = prompts["counts"]
    rows = [
        {
            "what": "source rows merged",
            "count": counts["merged"],
            "why": "the same conversation as an earlier row",
        },
        {"what": "source rows not taken", "count": counts["filtered"], "why": "prompts.limit"},
    ]
    failed = {status: count for status, count in quantiles["status"].items() if status != "ok"}
    rows += [
        {"what": f"references with status {s}", "count": c, "why": "not in any quantile"}
        for s, c in failed.items()
    ]
    if not failed:
        rows.append({"what": "references without a reward", "count": 0, "why": "every one was scored"})
    rows.append(
        {
            "what": "training prompts left out",
            "count": quantiles["prompts_left_out"],
            "why": "fewer than two scored references",
        }
    )
    rows.append(
        {
            "what": "training completions cut by the length limit",
            "count": artifacts["training_set"].facts["truncated"],
            "why": "kept: dropping them would change the reference policy",
        }
    )
    return rows


def _training_rows(data: TrainingData) -> pa.Table:
    targets = data.targets
    return pa.table(
        {
            "prompt_id": data.table["prompt_id"],
            "sample_index": data.table["sample_index"],
            "reward": data.table["reward"],
            "quantile": targets.quantile,
            "target": targets.target,
            "log_ratio_target": targets.log_ratio,
            "num_tokens": [len(ids) for ids in data.table["token_ids"].to_pylist()],
        }
    )


def _lineage(artifacts: Mapping[str, Manifest], steps: Sequence[BlockStep]) -> dict[str, str]:
    keys = {name: f"artifacts/{manifest.step}/{manifest.key}" for name, manifest in artifacts.items()}
    keys |= {step.label: step.recipe.blocks_path for step in steps}
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}
    return keys | {"qrpo": __version__} | packages
