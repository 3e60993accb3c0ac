"""Rows of one prompt as far as the store has them, by sample_index, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from qrpo_core.records import COMPLETIONS, REWARDS
from qrpo_core.rewards.thinking import UNFINISHED, answer_after
from qrpo_core.steps.blocks import RewardStep, SampleStep
from qrpo_core.steps.completions import Completions, OfflineCompletions
from qrpo_core.steps.quantiles import Rewards
from qrpo_core.store.blocks import Blocks, missing_runs, row_key
from qrpo_core.store.recipe import Recipe

Row = dict[str, Any]


def read_present(
    blocks: Blocks, recipe: Recipe, key: str, wanted: Sequence[int], schema: pa.Schema
) -> dict[int, Row]:
    """Those rows of one row key that are committed."""
    missing = missing_runs({key: wanted}, blocks.committed(recipe))
    absent = {index for run in missing for index in range(run.first, run.first + run.count)}
    pairs = [(key, index) for index in wanted if index not in absent]
    if not pairs:
        return {}
    rows = blocks.read_pairs(recipe, pairs, schema).to_pylist()
    return {row["sample_index"]: row for row in rows}


def drawn_rows(
    completions: Completions, prompt: Row, wanted: Sequence[int], token_ids: Mapping[int, list[int]]
) -> dict[int, Row]:
    """COMPLETIONS rows of a prompt; of the data set's own those columns that they have.

    token_ids : of the data set's completions, from a training set; tokenising them again would load the
        tokenizer, so that without it their number of tokens is None.
    """
    if isinstance(completions, SampleStep):
        blocks = completions.workspace.blocks
        return read_present(blocks, completions.recipe, prompt["prompt_id"], wanted, COMPLETIONS)
    if not isinstance(completions, OfflineCompletions):
        raise TypeError(f"completions of an unknown kind: {type(completions).__name__}")
    found = {}
    for row in completions.rows.to_pylist():
        index = row["sample_index"]
        if index in wanted:
            tokens = token_ids.get(index)
            found[index] = {
                "sample_index": index,
                "text": row["text"],
                "token_ids": tokens,
                "num_tokens": None if tokens is None else len(tokens),
                "finish_reason": None,  # nobody drew it
            }
    return found


def reward_rows(rewards: Rewards, prompt: Row, wanted: Sequence[int]) -> dict[int, Row]:
    """The REWARDS rows of a prompt that the experiment uses."""
    if isinstance(rewards, RewardStep):
        blocks = rewards.completions.workspace.blocks
        key = row_key(prompt["prompt_id"], prompt["reference_digest"])
        return read_present(blocks, rewards.recipe, key, wanted, REWARDS)
    rows = rewards.read().to_pylist()
    return {row["sample_index"]: row for row in rows if row["sample_index"] in wanted}


def graded_part(rewards: Rewards, drawn: Row | None, reward: Row | None) -> str | None:
    """What the experiment's reward sees of a completion, where that is not all of it.

    That a template opened the thinking is read from the reward's detail: the tokenizer is not loaded.
    """
    if drawn is None or not isinstance(rewards, RewardStep) or rewards.config.thinking is None:
        return None
    if reward is not None and reward["detail"] == UNFINISHED:
        return ""
    answer = answer_after(drawn["text"], rewards.config.thinking) or ""
    return None if answer == drawn["text"] else answer


def every_reward(completions: Completions, rewards: Rewards, prompt: str, index: int) -> list[Row]:
    """The rewards of one completion by every scorer, against every reference that it was scored with.

    used : whether it is the experiment's own scorer; which reference is today's, the digest says.
    """
    blocks = completions.workspace.blocks
    found: list[Row] = []
    for raw in blocks.recipes("reward"):
        recipe = Recipe.from_dict(raw)
        if recipe.inputs.get("completions") != completions.texts.key:
            continue
        keys = {
            run.key
            for block in blocks.committed(recipe)
            for run in block.runs
            if run.key.partition(".")[0] == prompt and run.first <= index < run.first + run.count
        }
        for key in sorted(keys):
            row = blocks.read_pairs(recipe, [(key, index)], REWARDS).to_pylist()[0]
            kept = {name: row[name] for name in ("reward", "status", "detail", "reference_digest")}
            used = recipe.key == rewards.recipe.key
            found.append(kept | {"scorer": recipe.config, "recipe": recipe.key, "used": used})
    return sorted(found, key=lambda row: not row["used"])


def blocks_of(blocks: Blocks, recipe: Recipe, key: str, index: int, what: str) -> list[Row]:
    """The committed blocks of a recipe that hold one row; `what` says what of the completion they hold."""
    names = ("block", "file", "rows", "created", "code", "facts")
    about = {"what": what, "step": recipe.step, "recipe": recipe.key}
    return [
        about | {name: getattr(block, name) for name in names}
        for block in blocks.committed(recipe)
        if key in block.runs.keys
        and any(run.key == key and run.first <= index < run.first + run.count for run in block.runs)
    ]


def ranges(indices: Sequence[int]) -> str:
    """0-7, 9, 12-13."""
    runs = missing_runs({"": sorted(indices)}, [])
    ends = [(run.first, run.first + run.count - 1) for run in runs]
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ends) or "none"
