"""The training set: tokens, rank counts and reference log-probs of the selected completions, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.schemas import COMPARED_LOGPROBS, LOGPROBS, RANK_COUNTS, TRAINING_SET
from qrpo_core.pipeline import sampler_logprobs
from qrpo_core.pipeline.row_steps import LogprobStep
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.store.blocks.planning import Wanted
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 2


def recipe(
    quantiles: Recipe, logprobs: LogprobStep, own: LogprobStep | None = None, *, compared: int = 0
) -> Recipe:
    """Decided by the rank counts and the log-probs.

    own : those of the data set's completions, in mode mixed.
    compared : rows of each engine with which the sampler's log-probs are compared; 0 where the log-probs of
        all rows are computed.
    """
    config = {"reference_logprobs": "sampler", "compared": compared} if compared else {}
    inputs = {"quantiles": quantiles.key, "logprobs": logprobs.recipe.key}
    if own is not None:
        inputs["own_logprobs"] = own.recipe.key
    return Recipe("training_set", VERSION, config, inputs)


def build(
    workspace: Workspace, set_recipe: Recipe, quantiles: Manifest, logprobs: Sequence[LogprobStep]
) -> Manifest:
    """Commit `training_set.parquet`, and the `pairs` and `reference_rewards` that belong to it.

    logprobs : of the training completions; in mode mixed of the samples, and of the data set's completions.

    With the sampler's log-probs also the rows of `logprobs`, as sampler_logprobs.FILE.
    """

    def make(scratch: Path) -> Built:
        counts = workspace.load(quantiles, "rank_counts.parquet", RANK_COUNTS)
        first = logprobs[0]
        chat, prompts = workspace.chat(first.policy.directory), first.completions.prompts
        turns = dict(zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True))
        tokens = {
            prompt: list(chat.prompt_token_ids(turns[prompt]))
            for prompt in pc.unique(counts["prompt_id"]).to_pylist()
        }
        from_sampler = "reference_logprobs" in set_recipe.config
        table = pa.concat_tables(
            _joined(workspace, part, step, tokens, from_sampler=from_sampler)
            for part, step in by_source(counts, logprobs)
        )
        files: dict[str, Path | bytes] = {}
        if from_sampler:
            compared = sampler_logprobs.compare(first)
            files[sampler_logprobs.FILE] = as_parquet(compared, COMPARED_LOGPROBS, "compared log-probs")
        files |= {
            "training_set.parquet": as_parquet(table, TRAINING_SET, "training set"),
            "pairs.parquet": workspace.artifacts.read(quantiles, "pairs.parquet"),
            "reference_rewards.parquet": workspace.artifacts.read(quantiles, "reference_rewards.parquet"),
        }
        facts = {"rows": len(table), "prompts": len(tokens), "selected": quantiles.facts["selected"]}
        return files, facts | {
            name: quantiles.facts[name] for name in ("sources",) if name in quantiles.facts
        }

    return workspace.make(set_recipe, make)


def by_source(table: pa.Table, steps: Sequence[LogprobStep]) -> list[tuple[pa.Table, LogprobStep]]:
    """The rows of each step: all of one; of two the samples, which are references, and the data set's.

    table : RANK_COUNTS or TRAINING_SET rows, the samples first. steps : `Round.logprob_steps`.
    """
    if len(steps) == 1:
        return [(table, steps[0])]
    parts = table.filter(table["in_pool"]), table.filter(pc.invert(table["in_pool"]))
    return list(zip(parts, steps, strict=True))


def _joined(
    workspace: Workspace,
    counts: pa.Table,
    step: LogprobStep,
    tokens: Mapping[str, list[int]],
    *,
    from_sampler: bool,
) -> pa.Table:
    """TRAINING_SET rows of the completions of one source. tokens : of the prompts."""
    pairs = list(zip(counts["prompt_id"].to_pylist(), counts["sample_index"].to_pylist(), strict=True))
    drawn = step.completions.read(pairs)
    if from_sampler:
        reference = sampler_logprobs.reported(pairs, drawn)
    else:
        reference = workspace.blocks.read_rows(step.recipe, pairs, LOGPROBS)["logprob"]
    table = counts.append_column(
        "prompt_token_ids", pa.array([tokens[prompt] for prompt, _ in pairs], pa.list_(pa.int32()))
    )
    return table.append_column("token_ids", drawn["token_ids"]).append_column("ref_logprob", reference)


def selected_rows(workspace: Workspace, quantiles: Manifest, *, in_pool: bool | None = None) -> Wanted:
    """The selected and ranked rows, by prompt: those whose log-probs the training set needs.

    in_pool : only those that are, or are not, references themselves; None for all.
    """
    counts = workspace.load(quantiles, "rank_counts.parquet", RANK_COUNTS)
    if in_pool is not None:
        counts = counts.filter(pc.equal(counts["in_pool"], in_pool))
    found: dict[str, list[int]] = {}
    for prompt, index in zip(
        counts["prompt_id"].to_pylist(), counts["sample_index"].to_pylist(), strict=True
    ):
        found.setdefault(prompt, []).append(index)
    return {prompt: sorted(indices) for prompt, indices in found.items()}
