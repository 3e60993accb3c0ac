"""What samples of a trained policy are drawn from: how much of the training is in the engine's copy.

An engine that computes in bfloat16 draws from a rounded copy, one that quantises from another still. Before
it draws, what it has loaded scores the training rows that the saved policy was compared on; the report says
the share beside the rewards that were drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.engines.base import Progress, ScoreRequest, no_progress
from qrpo_core.evaluation.saved import saved_in_words
from qrpo_core.steps.blocks import SampleStep
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.training import SCORED_ROWS
from qrpo_core.steps.workspace import Built
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.train.survival import ScoredRows

VERSION = 1


@dataclass(frozen=True)
class DrawnCopy:
    """The comparison of an engine's copy with the policy that was trained, as an artifact.

    step : draws from the policy. train : the artifact that holds the policy and the scored rows.
    """

    step: SampleStep
    train: Manifest

    @property
    def label(self) -> str:
        return f"copy, {self.step.label}"

    @property
    def recipe(self) -> Recipe:
        """Decided by the policy, and by how the engine loads it."""
        experiment, kind = self.step.workspace.experiment, self.step.engine_kind
        config = {
            "engine": kind,
            "dtype": experiment.model.dtype,
            "quantization": experiment.vllm.quantization if kind == "vllm" else None,
            "adapters": self.step.adapters is not None,
        }
        return Recipe("drawn", VERSION, config, {"train": self.train.key})

    def build(self, progress: Progress = no_progress) -> Manifest:
        """Score the rows and commit the figures."""

        def make(scratch: Path) -> Built:
            return {}, self._measure(progress)

        return self.step.workspace.make(self.recipe, make)

    def _measure(self, progress: Progress) -> dict[str, Any]:
        from qrpo_core.train.survival import ScoredRows, survival

        workspace = self.step.workspace
        scored = ScoredRows.from_json(workspace.artifacts.read(self.train, SCORED_ROWS))
        quantization = workspace.experiment.vllm.quantization
        if self.step.engine_kind == "vllm" and quantization is not None:
            dtype, score = quantization, self._by_engine
        else:
            dtype, score = _arithmetic(self.step), self._by_copy
        found = survival(scored.start, scored.trained, score(scored))
        progress(len(scored.rows))
        return {"dtype": dtype, **dataclasses.asdict(found)}

    def _by_engine(self, scored: ScoredRows) -> list[float]:
        """By the engine's own scoring: what it quantises to is nowhere else."""
        rows = [ScoreRequest(tuple(prompt), tuple(tokens)) for prompt, tokens in scored.rows]
        found = self.step.engine().logprobs(rows, temperature=scored.temperature)
        return [float(value) for value in found]

    def _by_copy(self, scored: ScoredRows) -> list[float]:
        """By what the engine loads, in float32 arithmetic."""
        from qrpo_core.data.collator import Example
        from qrpo_core.engines.numerics import pick_device
        from qrpo_core.train.survival import float32_logprobs

        self.step.workspace.close()  # the engine's memory; it is loaded anew where it draws
        device = pick_device()
        model = load_copy(self.step.policy, _arithmetic(self.step), self.step.adapters).to(device)
        rows = [Example(*row) for row in scored.rows]
        return float32_logprobs(model, rows, device, scored.temperature)


def drawn_copy(step: object) -> DrawnCopy | None:
    """What has to be measured before a step draws; None where it draws from no policy trained here."""
    if not isinstance(step, SampleStep) or step.engine_kind not in ("transformers", "vllm"):
        return None
    made = step.policy.made
    return None if made is None or SCORED_ROWS not in made.files else DrawnCopy(step, made)


def summary(facts: Mapping[str, Any]) -> str:
    """One line of what was measured."""
    return f"drawn from a {facts['dtype']} copy of the policy: {saved_in_words(facts)}"


def _arithmetic(step: SampleStep) -> str:
    """In which precision the engine of this machine multiplies the policy's weights."""
    dtype = step.workspace.experiment.model.dtype
    if step.engine_kind == "vllm":
        from qrpo_core.engines.vllm_setup import arithmetic

        return arithmetic(dtype)
    from qrpo_core.engines.numerics import compute_dtype, dtype_name, pick_device

    return dtype_name(compute_dtype(dtype, pick_device()))


def load_copy(policy: Policy, arithmetic: str, adapters: Path | None) -> Any:
    """The model whose weights are those that an engine computes with, as float32."""
    from qrpo_core.policy import load_model
    from qrpo_core.rounding import engine_directory
    from qrpo_core.train.lora import load_adapters

    base = policy if adapters is None or policy.start is None else policy.start
    model = load_model(engine_directory(base.directory, arithmetic), arithmetic).float()
    return model if adapters is None else load_adapters(model, adapters, arithmetic)
