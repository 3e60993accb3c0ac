"""The three steps whose rows are planned: samples, rewards, log-probs.

Each is a value with a recipe, the rows it is asked for, and one function from a plan to a table. What is
missing, how it is packed and when it is committed is the store's affair (`qrpo_core.store.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import Experiment, RewardConfig, recipe_fields
from qrpo_core.engines.base import Engine, Progress, SampleRequest, SamplingParams, ScoreRequest
from qrpo_core.ids import sample_seed
from qrpo_core.records import COMPLETIONS, LOGPROBS, REWARDS
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import reward_identity
from qrpo_core.steps import budgets
from qrpo_core.steps.budgets import Budget
from qrpo_core.steps.completions import Completions
from qrpo_core.steps.policies import ADAPTER, Policy
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockPlan, Wanted, row_key
from qrpo_core.store.recipe import Recipe

SAMPLE_VERSION = 1
REWARD_VERSION = 1
LOGPROB_VERSION = 1


def sample_recipe(workspace: Workspace, policy_digest: str) -> Recipe:
    """Decided by the policy and the settings of the draw; which engine drew a row is a column."""
    experiment = workspace.experiment
    config = recipe_fields(experiment.sampling) | {"dtype": experiment.model.dtype}
    return Recipe("sample", SAMPLE_VERSION, config, {"policy": drawn_from(experiment, policy_digest)})


def drawn_from(experiment: Experiment, policy_digest: str) -> str:
    """What names the distribution that samples come from.

    The fake engine draws from no policy, and a quantised one is another policy: their rows must never pass
    for the policy's.
    """
    engine = experiment.sampling.engine
    if engine == "fake":
        return f"fake:{policy_digest}"
    if engine == "vllm" and experiment.vllm.quantization is not None:
        return f"{experiment.vllm.quantization}:{policy_digest}"
    return policy_digest


def reward_recipe(workspace: Workspace, texts: Recipe, scorer: RewardConfig | None = None) -> Recipe:
    """Decided by the scorer (None: the experiment's) and the texts that it scores."""
    config = reward_identity(scorer or workspace.experiment.reward)
    return Recipe("reward", REWARD_VERSION, config, {"completions": texts.key})


def logprob_recipe(workspace: Workspace, policy_digest: str, completions: Recipe) -> Recipe:
    """Decided by the policy, its precision and the completions."""
    config = {"precision": workspace.experiment.training.precision}
    return Recipe(
        "logprob", LOGPROB_VERSION, config, {"policy": policy_digest, "completions": completions.key}
    )


class BlockStep(Protocol):
    """What planning, computing and committing need to know of a step."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def schema(self) -> pa.Schema: ...
    @property
    def wanted(self) -> Wanted: ...
    @property
    def label(self) -> str: ...

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """The plan's rows, and facts to remember with the block."""
        ...


@dataclass(frozen=True)
class SampleStep:
    """Draw `count` completions of every prompt from a policy, and of some as many as their budget says."""

    workspace: Workspace
    policy: Policy
    prompts: pa.Table
    count: int
    label: str
    budget: Budget = field(default_factory=dict)
    schema = COMPLETIONS

    @property
    def recipe(self) -> Recipe:
        return sample_recipe(self.workspace, self.policy.digest)

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
        return self.workspace.blocks.read_pairs(self.recipe, pairs, COMPLETIONS)

    @property
    def engine_kind(self) -> str:
        """Which engine draws. A server serves the reference: a policy that was trained is drawn from here."""
        kind = self.workspace.experiment.sampling.engine
        return "transformers" if kind == "endpoint" and self.policy.start is not None else kind

    @property
    def adapters(self) -> Path | None:
        """The adapters that the engine uses beside the policy's start; None where it loads the policy."""
        unmerged = self.engine_kind == "vllm" and not self.workspace.experiment.vllm.merged
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
        rows = _rows(self.prompts, {run.key for run in plan.runs})
        tokens = {key: chat.prompt_token_ids(row["messages"]) for key, row in rows.items()}
        requests = [
            SampleRequest(key, index, tokens[key], sample_seed(settings.seed, key, index))
            for key, index in plan.pairs()
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
        tokens_drawn = sum(len(c.token_ids) for c in drawn)
        return table, {"engine": engine.name, "exact": engine.exact, "tokens": tokens_drawn}


@dataclass(frozen=True)
class RewardStep:
    """Score completions, with the experiment's reward or with another scorer."""

    completions: Completions
    label: str
    scorer: RewardConfig | None = None
    schema = REWARDS

    @property
    def recipe(self) -> Recipe:
        return reward_recipe(self.completions.workspace, self.completions.texts, self.scorer)

    @property
    def wanted(self) -> Wanted:
        """Rows by prompt and by what it is checked against, so that a changed reference is scored anew."""
        prompts, wanted = self.completions.prompts, self.completions.wanted
        ids, digests = (prompts[name].to_pylist() for name in ("prompt_id", "reference_digest"))
        pairs = zip(ids, digests, strict=True)
        return {row_key(prompt, digest): wanted[prompt] for prompt, digest in pairs if prompt in wanted}

    def read(self) -> pa.Table:
        """Every row, REWARDS."""
        return self.completions.workspace.blocks.read(self.recipe, self.wanted, REWARDS)

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        workspace = self.completions.workspace
        pairs = [(key.partition(".")[0], index) for key, index in plan.pairs()]
        rows = _rows(self.completions.prompts, {prompt for prompt, _ in pairs})
        requests = [
            RewardRequest(
                prompt,
                index,
                tuple((turn["role"], turn["content"]) for turn in rows[prompt]["messages"]),
                text,
                rows[prompt]["reference"],
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
                "reference_digest": [rows[prompt]["reference_digest"] for prompt, _ in pairs],
                "reward": pa.array([score.reward for score in scores], pa.float64()),
                "status": [score.status for score in scores],
                "detail": [score.detail for score in scores],
            }
        )
        return table, {}


@dataclass(frozen=True)
class LogprobStep:
    """Log-probabilities of completions under a policy, at the trainer's precision.

    rows : which of the completions; all of them by default.
    """

    completions: Completions
    policy: Policy
    label: str
    rows: Wanted | None = None
    schema = LOGPROBS

    @property
    def recipe(self) -> Recipe:
        workspace = self.completions.workspace
        return logprob_recipe(workspace, self.policy.digest, self.completions.recipe)

    @property
    def wanted(self) -> Wanted:
        return self.completions.wanted if self.rows is None else self.rows

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        workspace = self.completions.workspace
        pairs = list(plan.pairs())
        chat = workspace.chat(self.policy.directory)
        engine = workspace.engine(
            self.policy.directory,
            kind="transformers",  # the trainer's own numerics, whichever engine drew the rows
            precision=workspace.experiment.training.precision,
        )
        rows = _rows(self.completions.prompts, {run.key for run in plan.runs})
        prompts = {key: chat.prompt_token_ids(row["messages"]) for key, row in rows.items()}
        tokens = self.completions.read(pairs)["token_ids"].to_pylist()
        asked = [ScoreRequest(prompts[key], tuple(ids)) for (key, _), ids in zip(pairs, tokens, strict=True)]
        table = pa.table(
            {
                "prompt_id": [key for key, _ in pairs],
                "sample_index": [index for _, index in pairs],
                "logprob": engine.logprobs(asked, progress),
                "num_tokens": [len(ids) for ids in tokens],
            }
        )
        return table, {
            "engine": engine.name,
            "tokens": sum(len(r.prompt_token_ids) + len(r.token_ids) for r in asked),
        }


def _rows(prompts: pa.Table, ids: Set[str]) -> dict[str, dict[str, Any]]:
    """The prompts with these ids, by id. A block holds few; Python objects of all take long to make."""
    found = prompts.filter(pc.is_in(prompts["prompt_id"], pa.array(sorted(ids), pa.string())))
    return {row["prompt_id"]: row for row in found.to_pylist()}
