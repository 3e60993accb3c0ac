"""Evaluation: the trained policy beside the reference on held-out prompts, and the report of all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from qrpo_core import __version__
from qrpo_core.config import recipe_fields
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER, EvaluationInput
from qrpo_core.evaluation.metrics import EvaluationResult, evaluate_policies
from qrpo_core.records import COMPLETIONS, LOGPROBS, REWARDS
from qrpo_core.steps.blocks import BlockStep, LogprobStep, RewardStep
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.training_set import TrainingData
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 1
REPORT_VERSION = 1


def recipe(
    workspace: Workspace,
    prompts: Recipe,
    before: RewardStep,
    after: RewardStep,
    policy: LogprobStep,
    ref: LogprobStep,
) -> Recipe:
    """Decided by the prompts, both policies' rewards, and the log-probs of the trained policy's samples."""
    inputs = {
        "prompts": prompts.key,
        "rewards_before": before.recipe.key,
        "rewards_after": after.recipe.key,
        "policy_logprobs": policy.recipe.key,
        "ref_logprobs": ref.recipe.key,
    }
    return Recipe("evaluate", VERSION, recipe_fields(workspace.experiment.evaluation), inputs)


def build(
    workspace: Workspace,
    asked: Recipe,
    before: RewardStep,
    after: RewardStep,
    policy: LogprobStep,
    ref: LogprobStep,
) -> Manifest:
    """Commit `evaluation.json`, and the rows it was made of: `before.parquet` and `after.parquet`."""

    def make(scratch: Path) -> Built:
        sampling = workspace.experiment.sampling
        rows_after = _evaluated(workspace, after)
        for name, step in (("policy_logprob", policy), ("ref_logprob", ref)):
            scored = workspace.blocks.read(step.recipe, step.wanted, LOGPROBS)
            rows_after = rows_after.append_column(name, scored["logprob"])
        data = EvaluationInput(
            _evaluated(workspace, before), rows_after, sampling.temperature, sampling.top_p
        )
        result = evaluate_policies(data, workspace.experiment.evaluation)
        files: dict[str, Path | bytes] = {
            "evaluation.json": json.dumps(result.to_dict()).encode(),
            "before.parquet": to_bytes(data.before, EVALUATED, "evaluation, before"),
            "after.parquet": to_bytes(data.after, EVALUATED_AFTER, "evaluation, after"),
        }
        return files, {"result": result.to_dict()}

    return workspace.make(asked, make)


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


def build_report(
    workspace: Workspace,
    asked: Recipe,
    *,
    prompts: pa.Table,
    evaluation: Manifest,
    train: Manifest,
    data: TrainingData,
    steps: Sequence[BlockStep],
    artifacts: Mapping[str, Manifest],
) -> Manifest:
    """Commit `report.html` and the figures of the UI as PNG.

    steps : the block steps whose cost the report states. artifacts : the coarse ones, by name.
    """

    def make(scratch: Path) -> Built:
        from qrpo_core.evaluation.report import ReportInput, pick_examples, render_report

        before = load(workspace, evaluation, "before.parquet", EVALUATED)
        after = load(workspace, evaluation, "after.parquet", EVALUATED_AFTER)
        report = ReportInput(
            experiment=workspace.experiment.model_dump(mode="json", exclude_defaults=False),
            evaluation=result_of(evaluation),
            before=before,
            after=after,
            training=_training_rows(data),
            diagnostics=data.diagnostics,
            history=json.loads(workspace.artifacts.read(train, "history.json")),
            stages=[cost(workspace, step) for step in steps] + [_artifact_cost(train)],
            filtered=filtered(artifacts),
            lineage=_lineage(artifacts, steps),
            examples=pick_examples(before, after, prompts),
        )
        return {"report.html": render_report(report).encode()}, {}

    return workspace.make(asked, make)


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


def _artifact_cost(train: Manifest) -> dict[str, Any]:
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
    rows = [
        {"what": f"prompts {name.replace('_', ' ')}", "count": count, "why": "prompt source"}
        for name, count in prompts["counts"].items()
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
