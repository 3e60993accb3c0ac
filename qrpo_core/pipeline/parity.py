"""Parity: whether the sampling engine and the trainer compute the same probabilities.

The check compares some rows before a large run. A wrong template, wrong weights behind an endpoint, a wrong
scaling of the logits or a coarse kernel show here and nowhere else: the samples still look like text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrpo_core.common.errors import EngineError
from qrpo_core.common.hashing import sample_seed
from qrpo_core.common.progress import Progress
from qrpo_core.engines.base import LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.kinds import TRAINERS, kind_of
from qrpo_core.pipeline.policies import rendering
from qrpo_core.pipeline.row_recipes import drawn_from
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.shards import ShardStep
from qrpo_core.pipeline.workspace import Built
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 1

#: Tokens of a compared completion: enough to see a difference, little to draw.
_TOKENS = 64
_WORST = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ParityCheck:
    """The comparison before a sampling step, as an artifact: one for each policy and engine."""

    step: SampleStep

    @property
    def label(self) -> str:
        return f"parity check, {self.step.label}"

    @property
    def recipe(self) -> Recipe:
        """Decided by the policy, the engine and the arithmetic on both sides."""
        experiment = self.step.workspace.experiment
        config = {
            "rows": experiment.parity.rows,
            "engine": experiment.sampling.engine,
            "endpoint": kind_of(experiment).server(experiment),
            "dtype": experiment.model.dtype,
            "precision": experiment.training.arithmetic,
        }
        config |= rendering(self.step.workspace, self.step.policy)
        return Recipe("parity", VERSION, config, {"policy": drawn_from(experiment, self.step.policy.digest)})

    def build(self, progress: Progress) -> Manifest:
        """Compare, and commit the figures; EngineError above the limit, and then nothing is committed."""

        def make(scratch: Path) -> Built:
            facts = compare(self.step, progress)
            limit = self.step.workspace.experiment.parity.limit
            if not facts["mean"] <= limit:
                raise EngineError(
                    f"{facts['engine']} and the training model differ: mean exp|difference of log-probs| of "
                    f"a token is {facts['mean']:.4f} over {facts['tokens']} tokens, "
                    f"parity.limit is {limit:g}",
                    where="; ".join(f"prompt {row['prompt_id']} {row['mean']:.4f}" for row in facts["worst"]),
                    remedy="see that the engine serves this policy in this precision; the rows differ most",
                )
            return {}, facts

        return self.step.workspace.make(self.recipe, make)


def parity_check(step: object) -> ParityCheck | None:
    """The comparison that must pass before a step computes rows; None where none is needed."""
    if isinstance(step, ShardStep):
        step = step.step
    if not isinstance(step, SampleStep):
        return None
    kind = step.engine_kind
    compared = kind.draws_from_policy and kind is not TRAINERS and step.workspace.experiment.parity.rows
    return ParityCheck(step) if compared else None


def summary(facts: Mapping[str, Any]) -> str:
    """One line of a comparison that was passed."""
    return (
        f"{facts['engine']} against {facts['trainer']}: mean exp|difference of log-probs| "
        f"{facts['mean']:.4f}, largest {facts['largest']:.3f}, over {facts['tokens']} tokens of "
        f"{facts['rows']} rows"
    )


def compare(step: SampleStep, progress: Progress) -> dict[str, Any]:
    """Compare both engines' log-probs on rows that the training model draws.

    The training model draws, so that each engine is loaded once and the one that draws afterwards stays.
    Returns facts of the artifact: mean and largest exp|difference| of a token, the rows that differ most, and
    what both were given (BOS, end tokens, template).
    """
    workspace, directory = step.workspace, step.policy.directory
    experiment = workspace.experiment
    chat = workspace.chat(directory)
    columns = (step.prompts[name].to_pylist() for name in ("prompt_id", "messages"))
    messages = dict(sorted(zip(*columns, strict=True), key=lambda row: row[0])[: experiment.parity.rows])
    prompts = list(messages)
    tokens = {prompt: chat.prompt_token_ids(turns) for prompt, turns in messages.items()}
    requests = [
        SampleRequest(prompt, 0, tokens[prompt], sample_seed(experiment.sampling.seed, prompt, 0))
        for prompt in prompts
    ]
    limit = min(_TOKENS, experiment.sampling.max_new_tokens)
    params = SamplingParams(1.0, 1.0, limit, tuple(chat.stop_token_ids))
    trainer = workspace.engine(directory, kind=TRAINERS, precision=experiment.training.arithmetic)
    drawn = trainer.sample(requests, params, progress)
    sequences = [LogprobRequest(tokens[row.prompt_id], row.token_ids) for row in drawn]
    trained = trainer.token_logprobs(sequences)
    sampler = step.engine()
    sampled = sampler.token_logprobs(sequences)
    return {
        "engine": sampler.name,
        "trainer": trainer.name,
        **figures(prompts, sampled, trained),
        "bos_tokens": max(chat.bos_count(ids) for ids in tokens.values()),
        "stop_token_ids": list(chat.stop_token_ids),
        "template": chat.template_digest,
    }


def figures(
    prompts: Sequence[str], sampled: Sequence[Floats], trained: Sequence[Floats]
) -> Mapping[str, Any]:
    """mean, largest : of exp|difference of log-probs| over all tokens. worst : the rows that differ most.

    sampled, trained : log-probs of every token in nats, an array a row. Infinite where one gives a token no
    chance and the other does.
    """
    rows: list[dict[str, Any]] = []
    ratios: list[Floats] = []
    for prompt, one, other in zip(prompts, sampled, trained, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = np.exp(np.abs(one - other))
        ratio[np.isnan(ratio)] = math.inf
        ratios.append(ratio)
        rows.append({"prompt_id": prompt, "mean": float(ratio.mean()), "largest": float(ratio.max())})
    every = np.concatenate(ratios)
    worst = sorted(rows, key=lambda row: (-row["mean"], row["prompt_id"]))[:_WORST]
    return {
        "rows": len(rows),
        "tokens": len(every),
        "mean": float(every.mean()),
        "largest": float(every.max()),
        "worst": worst,
    }
