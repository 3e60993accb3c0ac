"""The three steps whose rows are planned: samples, rewards, log-probs.

Each step has a recipe, its wanted rows, and one function from a plan to a table. `qrpo_core.store.blocks`
finds the missing rows, packs them into blocks and commits them.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.hashing import digest_json, sample_seed
from qrpo_core.common.progress import Progress
from qrpo_core.common.schemas import COMPLETIONS, LOGPROBS, REWARDS
from qrpo_core.config import RewardConfig
from qrpo_core.engines.base import Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.kinds import TRAINERS, EngineKind, kind_of
from qrpo_core.models.chat_template import Messages
from qrpo_core.pipeline import budgets
from qrpo_core.pipeline.budgets import Budget
from qrpo_core.pipeline.completions import Completions
from qrpo_core.pipeline.policies import ADAPTER, Policy
from qrpo_core.pipeline.row_recipes import LogprobSettings, logprob_recipe, reward_recipe, sample_recipe
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.store.blocks.planning import BlockPlan, Wanted, row_key
from qrpo_core.store.recipe import Recipe


class BlockStep(Protocol):
    """A step whose rows are planned, computed and committed block by block."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def schema(self) -> pa.Schema: ...
    @property
    def wanted(self) -> Wanted: ...
    @property
    def label(self) -> str: ...
    @property
    def at_once(self) -> int:
        """Rows that are computed at the same time: fewer take as long."""
        ...

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """The plan's rows, and facts for the block's manifest."""
        ...


@dataclass(frozen=True)
class SampleStep:
    """Sample `count` completions of every prompt from a policy, and more where the budget has more."""

    workspace: Workspace
    policy: Policy
    prompts: pa.Table
    count: int
    label: str
    budget: Budget = field(default_factory=dict)
    schema = COMPLETIONS

    @property
    def recipe(self) -> Recipe:
        return sample_recipe(self.workspace, self.policy)

    @property
    def texts(self) -> Recipe:
        return self.recipe

    @property
    def wanted(self) -> Wanted:
        prompts = self.prompts["prompt_id"].to_pylist()
        if not self.budget:
            return dict.fromkeys(prompts, range(self.count))
        return {prompt: range(max(self.count, self.budget.get(prompt, 0))) for prompt in prompts}

    @property
    def extent(self) -> dict[str, Any]:
        beyond = budgets.digest(self.budget, self.count)
        return {"count": self.count} | ({"budget": beyond} if beyond else {})

    def read(self, pairs: Sequence[tuple[str, int]]) -> pa.Table:
        return self.workspace.blocks.read_rows(self.recipe, pairs, COMPLETIONS)

    def opening(self, messages: Messages) -> str:
        return self.workspace.chat(self.policy.directory).turn_opening(messages)

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        return pc.equal(self._column(pairs, "finish_reason"), "length")

    def lengths(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        return self._column(pairs, "num_tokens")

    def _column(self, pairs: Sequence[tuple[str, int]], name: str) -> pa.Array:
        few = pa.schema([COMPLETIONS.field(each) for each in ("prompt_id", "sample_index", name)])
        return self.workspace.blocks.read_rows(self.recipe, pairs, few)[name].combine_chunks()

    @property
    def engine_kind(self) -> EngineKind:
        """The sampling engine; for a trained policy that it does not have, the trainer's."""
        kind = kind_of(self.workspace.experiment)
        return TRAINERS if kind.reference_only and self.policy.start is not None else kind

    @property
    def at_once(self) -> int:
        return self.engine_kind.at_once(self.workspace.experiment)

    @property
    def adapters(self) -> Path | None:
        """The adapters that the engine uses beside the policy's start; None where it loads the policy."""
        unmerged = self.engine_kind.unmerged(self.workspace.experiment)
        adapted = self.policy.adapted and self.policy.start is not None
        return self.policy.directory / ADAPTER if unmerged and adapted else None

    def engine(self) -> Engine:
        """The engine that draws, with the policy loaded."""
        policy, adapters = self.policy, self.adapters
        base = policy if adapters is None or policy.start is None else policy.start
        return self.workspace.engine(base.directory, kind=self.engine_kind, adapters=adapters)

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        settings = self.workspace.experiment.sampling
        chat = self.workspace.chat(self.policy.directory)
        engine = self.engine()
        rows = _rows(self.prompts, {row_range.key for row_range in plan.ranges})
        tokens = {key: chat.prompt_token_ids(row["messages"]) for key, row in rows.items()}
        requests = [
            SampleRequest(key, index, tokens[key], sample_seed(settings.seed, key, index))
            for key, index in plan.row_ids()
        ]
        params = SamplingParams(
            settings.temperature, settings.top_p, settings.max_new_tokens, tuple(chat.stop_token_ids)
        )
        drawn = engine.sample(requests, params, progress)
        table = pa.table(
            {
                "prompt_id": [c.prompt_id for c in drawn],
                "sample_index": [c.sample_index for c in drawn],
                "seed": pa.array([c.seed for c in drawn], pa.uint64()),
                "token_ids": [list(c.token_ids) for c in drawn],
                "text": [chat.decode(c.token_ids) for c in drawn],
                "finish_reason": [c.finish_reason for c in drawn],
                "num_tokens": [len(c.token_ids) for c in drawn],
                "logprob": pa.array([c.logprob for c in drawn], pa.float64()),
                "engine": [engine.name] * len(drawn),
            }
        )
        facts = {"tokens": sum(len(c.token_ids) for c in drawn)}
        facts["cut"] = sum(c.finish_reason == "length" for c in drawn)
        return table, {"engine": engine.name, "exact": engine.exact, **facts}


@dataclass(frozen=True)
class RewardStep:
    """Score completions, with the experiment's reward or with another scorer.

    rows : which of the completions; all of them by default.
    """

    completions: Completions
    label: str
    scorer: RewardConfig | None = None
    rows: Wanted | None = None
    schema = REWARDS

    @property
    def config(self) -> RewardConfig:
        """The scorer's section."""
        return self.scorer or self.completions.workspace.experiment.reward

    @property
    def recipe(self) -> Recipe:
        return reward_recipe(self.completions.workspace, self.completions.texts, self.scorer)

    @property
    def wanted(self) -> Wanted:
        """Rows by prompt and ground truth, so that a changed ground truth is scored again."""
        prompts = self.completions.prompts
        wanted = self.completions.wanted if self.rows is None else self.rows
        ids, digests = (prompts[name].to_pylist() for name in ("prompt_id", "ground_truth_digest"))
        pairs = zip(ids, digests, strict=True)
        return {row_key(prompt, digest): wanted[prompt] for prompt, digest in pairs if prompt in wanted}

    @property
    def retryable_digest(self) -> str:
        """A digest of the rows with a retryable status, "" for none; it is part of the quantiles' recipe."""
        retryable = self.completions.workspace.blocks.retryable(self.recipe)
        wanted = self.wanted if retryable else {}
        rows = sorted((key, index) for key, index in retryable if index in wanted.get(key, ()))
        return digest_json(rows) if rows else ""

    @property
    def at_once(self) -> int:
        return 1 if self.config.judge is None else self.config.judge.concurrency

    def read(self) -> pa.Table:
        """Every row, REWARDS."""
        return self.completions.workspace.blocks.read(self.recipe, self.wanted, REWARDS)

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        workspace = self.completions.workspace
        pairs = [(key.partition(".")[0], index) for key, index in plan.row_ids()]
        rows = _rows(self.completions.prompts, {prompt for prompt, _ in pairs})
        openings = {prompt: self.completions.opening(row["messages"]) for prompt, row in rows.items()}
        requests = [
            RewardRequest(
                prompt,
                index,
                tuple((turn["role"], turn["content"]) for turn in rows[prompt]["messages"]),
                text,
                rows[prompt]["ground_truth"],
                openings[prompt],
            )
            for (prompt, index), text in zip(
                pairs, self.completions.read(pairs)["text"].to_pylist(), strict=True
            )
        ]
        scores = workspace.reward(self.scorer).score(requests, progress)
        table = pa.table(
            {
                "prompt_id": [prompt for prompt, _ in pairs],
                "sample_index": [index for _, index in pairs],
                "ground_truth_digest": [rows[prompt]["ground_truth_digest"] for prompt, _ in pairs],
                "reward": pa.array([score.reward for score in scores], pa.float64()),
                "status": [score.status for score in scores],
                "detail": [score.detail for score in scores],
            }
        )
        return table, {}


@dataclass(frozen=True)
class LogprobStep:
    """Log-probabilities of completions under a policy.

    rows : which of the completions; all of them by default. settings : None for those of the trainer.
    """

    completions: Completions
    policy: Policy
    label: str
    rows: Wanted | None = None
    settings: LogprobSettings | None = None
    schema = LOGPROBS
    at_once = 1

    @property
    def recipe(self) -> Recipe:
        return logprob_recipe(self.policy.digest, self.completions.recipe, self._settings)

    @property
    def _settings(self) -> LogprobSettings:
        return self.settings or LogprobSettings.of_training(self.completions.workspace.experiment)

    @property
    def wanted(self) -> Wanted:
        return self.completions.wanted if self.rows is None else self.rows

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        workspace = self.completions.workspace
        pairs = list(plan.row_ids())
        chat = workspace.chat(self.policy.directory)
        engine = workspace.engine(self.policy.directory, kind=TRAINERS, precision=self._settings.precision)
        rows = _rows(self.completions.prompts, {row_range.key for row_range in plan.ranges})
        prompts = {key: chat.prompt_token_ids(row["messages"]) for key, row in rows.items()}
        tokens = self.completions.read(pairs)["token_ids"].to_pylist()
        requests = [
            LogprobRequest(prompts[key], tuple(ids)) for (key, _), ids in zip(pairs, tokens, strict=True)
        ]
        table = pa.table(
            {
                "prompt_id": [key for key, _ in pairs],
                "sample_index": [index for _, index in pairs],
                "logprob": engine.logprobs(requests, progress, self._settings.temperature),
                "num_tokens": [len(ids) for ids in tokens],
            }
        )
        return table, {
            "engine": engine.name,
            "tokens": sum(len(r.prompt_token_ids) + len(r.token_ids) for r in requests),
        }


def _rows(prompts: pa.Table, ids: Set[str]) -> dict[str, dict[str, Any]]:
    """The prompts with these ids, by id. A block holds few; Python objects of all take long to make."""
    found = prompts.filter(pc.is_in(prompts["prompt_id"], pa.array(sorted(ids), pa.string())))
    return {row["prompt_id"]: row for row in found.to_pylist()}
