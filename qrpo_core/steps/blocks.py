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

from qrpo_core.chat_template import Messages
from qrpo_core.config import Experiment, RewardConfig, recipe_fields
from qrpo_core.engines.base import Engine, Progress, SampleRequest, SamplingParams, ScoreRequest
from qrpo_core.ids import digest_json, sample_seed
from qrpo_core.records import COMPLETIONS, LOGPROBS, REWARDS
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import reward_identity
from qrpo_core.steps import budgets
from qrpo_core.steps.budgets import Budget
from qrpo_core.steps.completions import Completions
from qrpo_core.steps.policies import ADAPTER, Policy, rendering
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import BlockPlan, Wanted, row_key
from qrpo_core.store.recipe import Recipe

SAMPLE_VERSION = 2
REWARD_VERSION = 2
LOGPROB_VERSION = 1

#: Of both sides of a KL estimate; `evaluation.metrics.KL_ARITHMETIC` says it in words.
_KL_PRECISION = "fp32"


def sample_recipe(workspace: Workspace, policy: Policy) -> Recipe:
    """Decided by the policy, the settings of the draw and what its template is given; which engine drew a row
    is a column. Marks of thinking that are special tokens stand in its texts, and only then in the recipe."""
    experiment = workspace.experiment
    config = recipe_fields(experiment.sampling) | {"dtype": experiment.model.dtype}
    config |= rendering(workspace, policy)
    if shown := sorted(policy.special & workspace.thinking_marks):
        config["shown"] = shown
    return Recipe("sample", SAMPLE_VERSION, config, {"policy": drawn_from(experiment, policy.digest)})


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
    config = reward_identity(workspace.dated(scorer or workspace.experiment.reward))
    return Recipe("reward", REWARD_VERSION, config, {"completions": texts.key})


@dataclass(frozen=True)
class Scoring:
    """How log-probs are computed.

    precision : "bf16" (float32 weights under bfloat16 autocast, where that is native) or "fp32".
    temperature : log-probs are those of softmax(logits / temperature).
    """

    precision: str
    temperature: float

    @classmethod
    def of_training(cls, experiment: Experiment) -> Scoring:
        """The trainer's own, so that the log-ratio begins at 0."""
        return cls(experiment.training.precision, experiment.training_temperature)

    @classmethod
    def of_kl(cls, experiment: Experiment) -> Scoring:
        """That of a KL estimate: of the policies as they are drawn from, without the rounding of bfloat16.

        Under bfloat16 autocast two policies that are equal in float32 have a KL of about 0.01 nats a token
        (method.md 10).
        """
        return cls(_KL_PRECISION, experiment.sampling.temperature)


def logprob_recipe(policy_digest: str, completions: Recipe, scoring: Scoring) -> Recipe:
    """Decided by the policy, how its log-probs are computed, and the completions."""
    config: dict[str, Any] = {"precision": scoring.precision}
    if scoring.temperature != 1:  # at 1 rows keep the name under which stores have them
        config["temperature"] = scoring.temperature
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
        return self.workspace.blocks.read_pairs(self.recipe, pairs, COMPLETIONS)

    def opening(self, messages: Messages) -> str:
        return self.workspace.chat(self.policy.directory).turn_opening(messages)

    def cut(self, pairs: Sequence[tuple[str, int]]) -> pa.Array:
        few = pa.schema([COMPLETIONS.field(name) for name in ("prompt_id", "sample_index", "finish_reason")])
        ended = self.workspace.blocks.read_pairs(self.recipe, pairs, few)["finish_reason"]
        return pc.equal(ended, "length").combine_chunks()

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
        facts = {"tokens": sum(len(c.token_ids) for c in drawn)}
        facts["cut"] = sum(c.finish_reason == "length" for c in drawn)
        return table, {"engine": engine.name, "exact": engine.exact, **facts}


@dataclass(frozen=True)
class RewardStep:
    """Score completions, with the experiment's reward or with another scorer."""

    completions: Completions
    label: str
    scorer: RewardConfig | None = None
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
        """Rows by prompt and by what it is checked against, so that a changed reference is scored anew."""
        prompts, wanted = self.completions.prompts, self.completions.wanted
        ids, digests = (prompts[name].to_pylist() for name in ("prompt_id", "reference_digest"))
        pairs = zip(ids, digests, strict=True)
        return {row_key(prompt, digest): wanted[prompt] for prompt, digest in pairs if prompt in wanted}

    @property
    def unsettled(self) -> str:
        """What names the rows whose status can still pass, "" for none; quantiles are named by it too."""
        passing = self.completions.workspace.blocks.passing(self.recipe)
        wanted = self.wanted if passing else {}
        rows = sorted((key, index) for key, index in passing if index in wanted.get(key, ()))
        return digest_json(rows) if rows else ""

    def read(self) -> pa.Table:
        """Every row, REWARDS."""
        return self.completions.workspace.blocks.read(self.recipe, self.wanted, REWARDS)

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        workspace = self.completions.workspace
        pairs = [(key.partition(".")[0], index) for key, index in plan.pairs()]
        rows = _rows(self.completions.prompts, {prompt for prompt, _ in pairs})
        openings = {prompt: self.completions.opening(row["messages"]) for prompt, row in rows.items()}
        requests = [
            RewardRequest(
                prompt,
                index,
                tuple((turn["role"], turn["content"]) for turn in rows[prompt]["messages"]),
                text,
                rows[prompt]["reference"],
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
                "reference_digest": [rows[prompt]["reference_digest"] for prompt, _ in pairs],
                "reward": pa.array([score.reward for score in scores], pa.float64()),
                "status": [score.status for score in scores],
                "detail": [score.detail for score in scores],
            }
        )
        return table, {}


@dataclass(frozen=True)
class LogprobStep:
    """Log-probabilities of completions under a policy.

    rows : which of the completions; all of them by default. scoring : None computes them as the trainer does.
    """

    completions: Completions
    policy: Policy
    label: str
    rows: Wanted | None = None
    scoring: Scoring | None = None
    schema = LOGPROBS

    @property
    def recipe(self) -> Recipe:
        return logprob_recipe(self.policy.digest, self.completions.recipe, self._scoring)

    @property
    def _scoring(self) -> Scoring:
        return self.scoring or Scoring.of_training(self.completions.workspace.experiment)

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
            precision=self._scoring.precision,
        )
        rows = _rows(self.completions.prompts, {run.key for run in plan.runs})
        prompts = {key: chat.prompt_token_ids(row["messages"]) for key, row in rows.items()}
        tokens = self.completions.read(pairs)["token_ids"].to_pylist()
        asked = [ScoreRequest(prompts[key], tuple(ids)) for (key, _), ids in zip(pairs, tokens, strict=True)]
        table = pa.table(
            {
                "prompt_id": [key for key, _ in pairs],
                "sample_index": [index for _, index in pairs],
                "logprob": engine.logprobs(asked, progress, self._scoring.temperature),
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
