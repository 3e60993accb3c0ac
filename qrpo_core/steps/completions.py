"""Completions that can be scored and trained on: drawn from a policy, or brought by the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.chat_template import Messages
from qrpo_core.errors import DataError
from qrpo_core.records import REWARDS
from qrpo_core.steps.policies import Policy, rendering
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import Wanted
from qrpo_core.store.recipe import Recipe

#: Of the tokens of offline completions, and of their texts and grades.
OFFLINE_VERSION, TEXT_VERSION = 2, 1
UNSCORED_VERSION = 1


class Completions(Protocol):
    """Completions of some prompts, each known by (prompt_id, sample_index)."""

    @property
    def workspace(self) -> Workspace: ...
    @property
    def prompts(self) -> pa.Table:
        """The prompts that they answer, PROMPTS rows."""
        ...

    @property
    def recipe(self) -> Recipe:
        """What decides their tokens."""
        ...

    @property
    def texts(self) -> Recipe:
        """What decides their texts: all that a reward looks at."""
        ...

    @property
    def wanted(self) -> Wanted:
        """The sample indices of every prompt."""
        ...

    @property
    def extent(self) -> dict[str, Any]:
        """What names their number, JSON-ready, for recipes of tables that hold them all."""
        ...

    def read(self, pairs: Sequence[tuple[str, int]]) -> pa.Table:
        """Columns token_ids, text and finish_reason of the rows asked for, in that order."""
        ...

    def opening(self, messages: Messages) -> str:
        """What stands before each text in the assistant's turn, written by the chat template."""
        ...

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        """Whether the length limit ended each of them, bool."""
        ...


@dataclass(frozen=True)
class OfflineCompletions:
    """The data set's own completions, as the assistant's turns of a policy's chat template.

    offline : OFFLINE rows; those of other prompts are left alone. A sample_index is a function of the text,
        so a row keeps its name whatever is added to the data set, and its text needs no other.
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
        return {}  # the prompts' recipe, by the source's content

    @cached_property
    def rows(self) -> pa.Table:
        """The OFFLINE rows of these prompts; a completion in several pairs has several."""
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
                where="training_data.mode 'offline'",
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
        return ""  # the data set's text is the whole answer, with its thinking if it has any

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        return pa.array([False] * len(pairs), pa.bool_())  # a data set's answers are taken as whole


@dataclass(frozen=True)
class GivenRewards:
    """The rewards that a data set gives its completions, in place of a scorer's."""

    completions: OfflineCompletions

    @property
    def recipe(self) -> Recipe:
        return Recipe("given_rewards", TEXT_VERSION, {}, {})

    @property
    def unsettled(self) -> str:
        """None of them changes."""
        return ""

    def read(self) -> pa.Table:
        """REWARDS rows; a completion without a grade has status parse_error."""
        # A completion stands once for each of its pairs, with one reward.
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
    """The data set's own pairs, which nothing scores: their labels say which side is preferred."""

    completions: OfflineCompletions

    @property
    def recipe(self) -> Recipe:
        return Recipe("unscored", UNSCORED_VERSION, {}, {})

    @property
    def unsettled(self) -> str:
        """There is none."""
        return ""

    def read(self) -> pa.Table:
        """No REWARDS row."""
        return REWARDS.empty_table()
