"""The stored rows of one prompt, by sample_index, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.schemas import COMPLETIONS, REWARDS
from qrpo_core.pipeline.completions import Completions, OfflineCompletions, Rewards
from qrpo_core.pipeline.row_steps import RewardStep, SampleStep
from qrpo_core.rewards.thinking import UNFINISHED, answer_after
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.planning import ranges_of, row_key
from qrpo_core.store.recipe import Recipe

Row = dict[str, Any]


def read_present(
    blocks: BlockStore, recipe: Recipe, key: str, wanted: Sequence[int], schema: pa.Schema
) -> dict[int, Row]:
    """The committed rows among the wanted ones of one row key."""
    present = set().union(*(block.ranges.indices(key) for block in blocks.committed(recipe)))
    found = [(key, index) for index in wanted if index in present]
    if not found:
        return {}
    rows = blocks.read_rows(recipe, found, schema).to_pylist()
    return {row["sample_index"]: row for row in rows}


def drawn_rows(
    completions: Completions, prompt: Row, wanted: Sequence[int], token_ids: Mapping[int, list[int]]
) -> dict[int, Row]:
    """The COMPLETIONS rows of a prompt; for the data set's completions only some of the columns.

    token_ids : of the data set's completions, from a training set. Without it their number of tokens is None,
        since counting them would load the tokenizer.
    """
    if isinstance(completions, SampleStep):
        blocks = completions.workspace.blocks
        return read_present(blocks, completions.recipe, prompt["prompt_id"], wanted, COMPLETIONS)
    if not isinstance(completions, OfflineCompletions):
        raise TypeError(f"completions of an unknown kind: {type(completions).__name__}")
    rows = completions.rows.filter(pc.is_in(completions.rows["sample_index"], pa.array(wanted, pa.int32())))
    found = {}
    for row in rows.to_pylist():
        index, tokens = row["sample_index"], token_ids.get(row["sample_index"])
        found[index] = {
            "sample_index": index,
            "text": row["text"],
            "token_ids": tokens,
            "num_tokens": None if tokens is None else len(tokens),
            "finish_reason": None,  # no policy drew it
        }
    return found


def reward_rows(rewards: Rewards, prompt: Row, wanted: Sequence[int]) -> dict[int, Row]:
    """The REWARDS rows of a prompt that the experiment uses."""
    if isinstance(rewards, RewardStep):
        blocks = rewards.completions.workspace.blocks
        key = row_key(prompt["prompt_id"], prompt["ground_truth_digest"])
        return read_present(blocks, rewards.recipe, key, wanted, REWARDS)
    rows = rewards.read().to_pylist()
    return {row["sample_index"]: row for row in rows if row["sample_index"] in wanted}


def graded_part(rewards: Rewards, drawn: Row | None, reward: Row | None) -> str | None:
    """The part of a completion that the experiment's reward grades; None if it grades all of it.

    The reward's detail tells whether a template opened the thinking, so the tokenizer is not loaded.
    """
    if drawn is None or not isinstance(rewards, RewardStep) or rewards.config.thinking is None:
        return None
    if reward is not None and reward["detail"] == UNFINISHED:
        return ""
    answer = answer_after(drawn["text"], rewards.config.thinking) or ""
    return None if answer == drawn["text"] else answer


def every_reward(completions: Completions, rewards: Rewards, prompt: str, index: int) -> list[Row]:
    """The rewards of one completion by every scorer and against every ground truth, as far as stored.

    used : whether it is the experiment's own scorer. The digest identifies the current ground truth.
    """
    blocks = completions.workspace.blocks
    found: list[Row] = []
    for raw in blocks.recipes("reward"):
        recipe = Recipe.from_dict(raw)
        if recipe.inputs.get("completions") != completions.texts.key:
            continue
        keys = {
            each.key
            for block in blocks.committed(recipe)
            for each in block.ranges
            if each.key.partition(".")[0] == prompt and each.first <= index < each.first + each.count
        }
        for key in sorted(keys):
            row = blocks.read_rows(recipe, [(key, index)], REWARDS).to_pylist()[0]
            kept = {name: row[name] for name in ("reward", "status", "detail", "ground_truth_digest")}
            used = recipe.key == rewards.recipe.key
            found.append(kept | {"scorer": recipe.config, "recipe": recipe.key, "used": used})
    return sorted(found, key=lambda row: not row["used"])


def blocks_of(blocks: BlockStore, recipe: Recipe, key: str, index: int, what: str) -> list[Row]:
    """The committed blocks of a recipe that hold one row; `what` names the kind of their rows."""
    names = ("block", "file", "rows", "created", "code", "facts")
    about = {"what": what, "step": recipe.step, "recipe": recipe.key}
    return [
        about | {name: getattr(block, name) for name in names}
        for block in blocks.committed(recipe)
        if index in block.ranges.indices(key)
    ]


def ranges(indices: Sequence[int]) -> str:
    """Indices as text, such as "0-7, 9, 12-13"."""
    ends = [(each.first, each.first + each.count - 1) for each in ranges_of({"": sorted(indices)})]
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ends) or "none"
