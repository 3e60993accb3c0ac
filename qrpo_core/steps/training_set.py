"""The training set: tokens, rank counts and reference log-probs of the selected completions, in one table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from qrpo_core.records import LOGPROBS, RANK_COUNTS, TRAINING_SET
from qrpo_core.steps.blocks import LogprobStep
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.blocks import Wanted
from qrpo_core.store.recipe import Recipe

VERSION = 2


def recipe(quantiles: Recipe, logprobs: LogprobStep) -> Recipe:
    """Decided by the rank counts and the log-probs."""
    return Recipe("training_set", VERSION, {}, {"quantiles": quantiles.key, "logprobs": logprobs.recipe.key})


def build(workspace: Workspace, asked: Recipe, quantiles: Manifest, logprobs: LogprobStep) -> Manifest:
    """Commit `training_set.parquet`, and the `pairs` and `reference_rewards` that belong to it."""

    def make(scratch: Path) -> Built:
        counts = load(workspace, quantiles, "rank_counts.parquet", RANK_COUNTS)
        pairs = list(zip(counts["prompt_id"].to_pylist(), counts["sample_index"].to_pylist(), strict=True))
        completions = logprobs.completions
        drawn = completions.read(pairs)
        scored = workspace.blocks.read_pairs(logprobs.recipe, pairs, LOGPROBS)
        chat = workspace.chat(logprobs.policy.directory)
        prompts = completions.prompts
        turns = dict(zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True))
        tokens = {
            prompt: list(chat.prompt_token_ids(turns[prompt])) for prompt in {prompt for prompt, _ in pairs}
        }
        table = counts.append_column(
            "prompt_token_ids", pa.array([tokens[prompt] for prompt, _ in pairs], pa.list_(pa.int32()))
        )
        table = table.append_column("token_ids", drawn["token_ids"]).append_column(
            "ref_logprob", scored["logprob"]
        )
        files: dict[str, Path | bytes] = {
            "training_set.parquet": to_bytes(table, TRAINING_SET, "training set"),
            "pairs.parquet": workspace.artifacts.read(quantiles, "pairs.parquet"),
            "reference_rewards.parquet": workspace.artifacts.read(quantiles, "reference_rewards.parquet"),
        }
        return files, {"rows": len(table), "prompts": len(tokens), "selected": quantiles.facts["selected"]}

    return workspace.make(asked, make)


def wanted_rows(workspace: Workspace, quantiles: Manifest) -> Wanted:
    """The rows that a training set needs log-probs of: those that were selected and ranked."""
    counts = load(workspace, quantiles, "rank_counts.parquet", RANK_COUNTS)
    found: dict[str, list[int]] = {}
    for prompt, index in zip(
        counts["prompt_id"].to_pylist(), counts["sample_index"].to_pylist(), strict=True
    ):
        found.setdefault(prompt, []).append(index)
    return {prompt: sorted(indices) for prompt, indices in found.items()}
