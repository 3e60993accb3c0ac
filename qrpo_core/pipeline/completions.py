"""Completions to score and train on, from a policy or from the data set, and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import REWARDS
from qrpo_core.models.chat_template import Messages
from qrpo_core.pipeline.policies import Policy, rendering
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import Wanted
from qrpo_core.store.recipe import Recipe

#: Versions of the recipes of offline completions (tokens), and of their texts and given rewards.
OFFLINE_VERSION, TEXT_VERSION = 2, 1
UNSCORED_VERSION = 1


class Completions(Protocol):
    """Completions of some prompts, each identified by (prompt_id, sample_index)."""

    @property
    def workspace(self) -> Workspace: ...
    @property
    def prompts(self) -> pa.Table:
        """Their prompts, PROMPTS rows."""
        ...

    @property
    def recipe(self) -> Recipe:
        """The recipe of their tokens."""
        ...

    @property
    def texts(self) -> Recipe:
        """The recipe of their texts. Rewards depend on texts alone."""
        ...

    @property
    def wanted(self) -> Wanted:
        """The sample indices of every prompt."""
        ...

    @property
    def extent(self) -> dict[str, Any]:
        """Their number in JSON types, for the recipes of tables that hold all of them."""
        ...

    def read(self, pairs: Sequence[tuple[str, int]]) -> pa.Table:
        """Columns token_ids, text and finish_reason of the given rows, in the order of `pairs`."""
        ...

    def opening(self, messages: Messages) -> str:
        """The text that the chat template writes before each completion in the assistant's turn."""
        ...

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        """Whether the length limit ended each of the given rows, bool."""
        ...

    def lengths(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        """The number of tokens of each of the given rows."""
        ...


class Rewards(Protocol):
    """The rewards of completions, from a scorer or from the data set."""

    @property
    def completions(self) -> Completions: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def retryable_digest(self) -> str:
        """A digest of the rows with a retryable status; "" for none."""
        ...

    def read(self) -> pa.Table:
        """All REWARDS rows."""
        ...


@dataclass(frozen=True)
class OfflineCompletions:
    """The data set's own completions, written as assistant turns by a policy's chat template.

    offline : OFFLINE rows; those of other prompts are ignored. Their sample_index is a function of the text.
        So a row keeps its identity when the data set grows, and the recipe of the texts is empty.
    """

    workspace: Workspace
    policy: Policy
    prompts: pa.Table
    offline: pa.Table

    @property
    def recipe(self) -> Recipe:
        given = rendering(self.workspace, self.policy)
        return Recipe("offline", OFFLINE_VERSION, given, {"policy": self.policy.digest})

    @property
    def texts(self) -> Recipe:
        return Recipe("offline_text", TEXT_VERSION, {}, {})

    @property
    def extent(self) -> dict[str, Any]:
        return {}  # the prompts' recipe names the source's content, and so these rows

    @cached_property
    def rows(self) -> pa.Table:
        """The OFFLINE rows of these prompts; a completion in several pairs has several rows."""
        return self.offline.filter(pc.is_in(self.offline["prompt_id"], value_set=self.prompts["prompt_id"]))

    @cached_property
    def _text(self) -> dict[tuple[str, int], str]:
        columns = (self.rows[name].to_pylist() for name in ("prompt_id", "sample_index", "text"))
        return {(prompt, index): text for prompt, index, text in zip(*columns, strict=True)}

    @cached_property
    def wanted(self) -> Wanted:
        found: dict[str, set[int]] = {}
        for prompt, index in self._text:
            found.setdefault(prompt, set()).add(index)
        if not found:
            raise DataError(
                "no training prompt has a completion of its own",
                where=f"training_data.mode {self.workspace.experiment.training_data.mode!r}",
                remedy="look at the fields of prompts.chosen_field or prompts.completion_fields",
            )
        order = self.prompts["prompt_id"].to_pylist()
        return {prompt: tuple(sorted(found[prompt])) for prompt in order if prompt in found}

    def read(self, pairs: Sequence[tuple[str, int]]) -> pa.Table:
        chat = self.workspace.chat(self.policy.directory)
        turns = dict(
            zip(self.prompts["prompt_id"].to_pylist(), self.prompts["messages"].to_pylist(), strict=True)
        )
        texts = [self._text[pair] for pair in pairs]
        tokens = [
            chat.encode_completion(text, turns[prompt])
            for (prompt, _), text in zip(pairs, texts, strict=True)
        ]
        return pa.table(
            {
                "token_ids": pa.array(tokens, pa.list_(pa.int32())),
                "text": pa.array(texts, pa.string()),
                "finish_reason": pa.array(["stop"] * len(texts), pa.string()),
            }
        )

    def opening(self, messages: Messages) -> str:
        return ""  # the data set's text is the whole turn, thinking included

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        return pa.array([False] * len(pairs), pa.bool_())  # a data set's completions count as whole

    def lengths(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        return pc.list_value_length(self.read(pairs)["token_ids"]).combine_chunks()


@dataclass(frozen=True)
class GivenRewards:
    """The rewards that the data set gives its own completions."""

    completions: OfflineCompletions

    @property
    def recipe(self) -> Recipe:
        return Recipe("given_rewards", TEXT_VERSION, {}, {})

    @property
    def retryable_digest(self) -> str:
        """Always "": the data set's rewards do not change."""
        return ""

    def read(self) -> pa.Table:
        """One REWARDS row for each completion; without a grade its status is parse_error."""
        # A completion has a row for each of its pairs, all with the same reward.
        names = ["prompt_id", "sample_index", "reward"]
        rows = self.completions.rows.select(names).group_by(names, use_threads=False).aggregate([])
        given = rows["reward"].is_valid()
        status = pc.if_else(given, "ok", "parse_error")
        empty = pa.array([""] * len(rows), pa.string())
        return pa.table(
            [
                rows["prompt_id"],
                rows["sample_index"],
                empty,
                rows["reward"],
                status,
                pc.if_else(given, "", "the data set gives no reward"),
            ],
            schema=REWARDS,
        )


@dataclass(frozen=True)
class Unscored:
    """The data set's own pairs without rewards: their labels say which side is preferred."""

    completions: OfflineCompletions

    @property
    def recipe(self) -> Recipe:
        return Recipe("unscored", UNSCORED_VERSION, {}, {})

    @property
    def retryable_digest(self) -> str:
        """Always "": there are no rewards."""
        return ""

    def read(self) -> pa.Table:
        """An empty REWARDS table."""
        return REWARDS.empty_table()
