"""The stored rows of a group of completions, joined: conversation, text, rewards, quantile, log-probs.

Rows that are not in the store yet are left out, and what is not known of a row yet is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import COMPLETIONS, LOGPROBS, PROMPTS, REWARDS
from qrpo_core.inspection.completion_groups import CompletionGroup
from qrpo_core.pipeline.completions import OfflineCompletions
from qrpo_core.pipeline.row_steps import LogprobStep, RewardStep
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.planning import RowId, RowRanges, Wanted, ranges_of, row_key, subtract
from qrpo_core.store.recipe import Recipe

#: Rows that are joined at a time: their texts and conversations are in memory.
_CHUNK = 4096

_SCORED = ("reward", "status", "detail")


def _nullable(field: pa.Field, about: str | None = None) -> pa.Field:
    changed = field.with_nullable(True)
    return changed if about is None else changed.with_metadata({"about": about})


def _number(name: str, about: str) -> pa.Field:
    return pa.field(name, pa.float64(), metadata={"about": about})


#: One row a completion, whichever group it is of.
JOINED = pa.schema(
    [
        pa.field("source", pa.string(), False, {"about": "the group: references, offline, round 2, ..."}),
        *[PROMPTS.field(name) for name in ("prompt_id", "split", "messages", "ground_truth")],
        COMPLETIONS.field("sample_index"),
        COMPLETIONS.field("text"),
        _nullable(COMPLETIONS.field("token_ids"), "completion tokens; null for the data set's own"),
        _nullable(COMPLETIONS.field("finish_reason"), "stop, or length (cut by the limit); null: not drawn"),
        _nullable(COMPLETIONS.field("num_tokens")),
        _nullable(COMPLETIONS.field("engine"), "which engine drew the row; null for the data set's own"),
        _number("sampler_logprob", "sum of log-probs under the sampler, nats"),
        _number("ref_logprob", "log pi_ref, nats; null where it was not computed"),
        _number("policy_logprob", "log-prob under the trained policy, nats; null where it was not computed"),
        REWARDS.field("reward"),
        _nullable(REWARDS.field("status"), "ok, or why there is no reward; null: not scored"),
        _nullable(REWARDS.field("detail"), "why a row is not ok"),
        _number("quantile", "the quantile reward R_q that the training uses; null: not trained on"),
    ]
)


@dataclass(frozen=True)
class StoredRows:
    """The rows of a group that the store has."""

    group: CompletionGroup

    @property
    def blocks(self) -> BlockStore:
        return self.group.completions.workspace.blocks

    @cached_property
    def wanted(self) -> Wanted:
        """The completions in the store, by prompt."""
        completions = self.group.completions
        if isinstance(completions, OfflineCompletions):
            return completions.wanted if len(completions.rows) else {}
        return present_rows(self.blocks, completions.recipe, completions.wanted)

    def chunks(self) -> Iterator[pa.Table]:
        """The JOINED rows, some thousand at a time, in the order of the prompts."""
        for some in _chunks(self.wanted):
            yield self._joined(some)

    def judged(self) -> Iterator[pa.Table]:
        """REWARDS rows of the evaluation's judges, with the columns `source` and `judge`, chunk by chunk."""
        for name, step in self.group.judges.items():
            for some in _chunks(self.wanted):
                rows = self._scored(step, some)
                for column, value in (("judge", name), ("source", self.group.name)):
                    rows = rows.add_column(0, column, pa.array([value] * len(rows), pa.string()))
                yield rows

    @cached_property
    def _prompts(self) -> pa.Table:
        return self.group.completions.prompts

    @cached_property
    def _place(self) -> dict[str, int]:
        return {prompt: row for row, prompt in enumerate(self._prompts["prompt_id"].to_pylist())}

    @cached_property
    def _digests(self) -> list[str]:
        digests: list[str] = self._prompts["ground_truth_digest"].to_pylist()
        return digests

    def _joined(self, wanted: Wanted) -> pa.Table:
        rows = [(prompt, index) for prompt, indices in wanted.items() for index in indices]
        about = self._prompts.take(pa.array([self._place[prompt] for prompt, _ in rows], pa.int64()))
        columns = {name: about[name] for name in ("prompt_id", "split", "messages", "ground_truth")}
        columns |= self._texts(wanted, rows)
        columns["source"] = pa.array([self.group.name] * len(rows), pa.string())
        columns["sample_index"] = pa.array([index for _, index in rows], pa.int32())
        columns |= {
            "ref_logprob": self._logprobs(self.group.ref_logprobs, wanted, rows),
            "policy_logprob": self._logprobs(self.group.policy_logprobs, wanted, rows),
            "quantile": pa.array([self._quantiles.get(row) for row in rows], pa.float64()),
        }
        scored = self._rewards(wanted)
        values = [scored.get(row, (None,) * len(_SCORED)) for row in rows]
        for place, name in enumerate(_SCORED):
            columns[name] = pa.array([value[place] for value in values], JOINED.field(name).type)
        return pa.table([columns[name] for name in JOINED.names], schema=JOINED)

    def _texts(self, wanted: Wanted, rows: list[RowId]) -> dict[str, Any]:
        completions = self.group.completions
        drawn = ("token_ids", "finish_reason", "num_tokens", "engine", "logprob")
        if not isinstance(completions, OfflineCompletions):
            found = self.blocks.read(completions.recipe, wanted, COMPLETIONS)
            columns = {name: found[name] for name in ("text", *drawn)}
        else:  # counting their tokens would load the tokenizer; the training set has them
            columns = {name: pa.nulls(len(rows), COMPLETIONS.field(name).type) for name in drawn}
            columns["text"] = pa.array([self._own_texts[row] for row in rows], pa.string())
        return columns | {"sampler_logprob": columns.pop("logprob")}

    def _logprobs(self, step: LogprobStep | None, wanted: Wanted, rows: list[RowId]) -> pa.Array:
        if step is None:
            return pa.nulls(len(rows), pa.float64())
        found = self.blocks.read(step.recipe, present_rows(self.blocks, step.recipe, wanted), LOGPROBS)
        known = _by_row(found, ("logprob",))
        return pa.array([known.get(row, (None,))[0] for row in rows], pa.float64())

    def _rewards(self, wanted: Wanted) -> Mapping[RowId, tuple[Any, ...]]:
        """Reward, status and detail of the completions that have them."""
        rewards = self.group.rewards
        return (
            _by_row(self._scored(rewards, wanted), _SCORED)
            if isinstance(rewards, RewardStep)
            else self._given
        )

    def _scored(self, step: RewardStep, wanted: Wanted) -> pa.Table:
        """The REWARDS rows of a scorer that are in the store."""
        keyed = {
            row_key(prompt, self._digests[self._place[prompt]]): indices for prompt, indices in wanted.items()
        }
        return self.blocks.read(step.recipe, present_rows(self.blocks, step.recipe, keyed), REWARDS)

    @cached_property
    def _given(self) -> Mapping[RowId, tuple[Any, ...]]:
        return _by_row(self.group.rewards.read(), _SCORED)

    @cached_property
    def _own_texts(self) -> dict[RowId, str]:
        """The texts of the data set's own completions."""
        completions = self.group.completions
        assert isinstance(completions, OfflineCompletions)
        return dict(zip(_ids(completions.rows), completions.rows["text"].to_pylist(), strict=True))

    @cached_property
    def _quantiles(self) -> dict[RowId, float]:
        """The quantile rewards of the completions that a round trains on, once it has its training set."""
        round_ = self.group.round_
        if round_ is None:
            return {}
        made = round_.workspace.artifacts.find(round_.training_set_recipe)
        if made is None:
            return {}
        try:
            data = derive(round_.workspace, made)
        except ObjectiveError:  # no target for these settings; `qrpo explain` says why
            return {}
        if data.targets is None:
            return {}
        return dict(zip(_ids(data.table), data.targets.quantile.tolist(), strict=True))


def present_rows(blocks: BlockStore, recipe: Recipe, wanted: Wanted) -> dict[str, list[int]]:
    """The wanted rows that a committed block has, by row key in the order of `wanted`."""
    asked = RowRanges(ranges_of(wanted))
    absent = subtract(asked, blocks.committed(recipe))
    found: dict[str, list[int]] = {}
    for key, first, count in subtract(asked, [_Rows(RowRanges(absent))]):
        found.setdefault(key, []).extend(range(first, first + count))
    return found


@dataclass(frozen=True)
class _Rows:
    """Rows where `subtract` takes a block."""

    ranges: RowRanges


def _chunks(wanted: Wanted) -> Iterator[Wanted]:
    some: dict[str, list[int]] = {}
    rows = 0
    for prompt, indices in wanted.items():
        some[prompt] = list(indices)
        rows += len(indices)
        if rows >= _CHUNK:
            yield some
            some, rows = {}, 0
    if some:
        yield some


def _ids(table: pa.Table) -> list[RowId]:
    return list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))


def _by_row(table: pa.Table, names: tuple[str, ...]) -> Mapping[RowId, tuple[Any, ...]]:
    columns = [table[name].to_pylist() for name in names]
    return dict(zip(_ids(table), zip(*columns, strict=True), strict=True))
