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

from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.training import LOGPROB_COMPARISON
from qrpo_core.pipeline.workspace import Built
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe
from qrpo_core.training.survival import survival_text

if TYPE_CHECKING:
    from qrpo_core.training.survival import LogprobComparison

VERSION = 1


@dataclass(frozen=True)
class EngineCopy:
    """The comparison of an engine's copy with the policy that was trained, as an artifact.

    step : draws from the policy. train : the artifact that holds the policy and the log-probs of some
        training rows.
    """

    step: SampleStep
    train: Manifest

    @property
    def label(self) -> str:
        return f"engine weights check, {self.step.label}"

    @property
    def recipe(self) -> Recipe:
        """Decided by the policy, and by how the engine loads it."""
        experiment, kind = self.step.workspace.experiment, self.step.engine_kind
        config = {
            "engine": kind.name,
            "dtype": experiment.model.dtype,
            "quantization": kind.quantization(experiment),
            "adapters": self.step.adapters is not None,
        }
        return Recipe("engine_copy", VERSION, config, {"train": self.train.key})

    def build(self, progress: Progress = no_progress) -> Manifest:
        """Score the rows and commit the figures."""

        def make(scratch: Path) -> Built:
            return {}, self._measure(progress)

        return self.step.workspace.make(self.recipe, make)

    def _measure(self, progress: Progress) -> dict[str, Any]:
        from qrpo_core.training.survival import LogprobComparison, survival

        workspace = self.step.workspace
        stored = LogprobComparison.from_json(workspace.artifacts.read(self.train, LOGPROB_COMPARISON))
        quantization = self.step.engine_kind.quantization(workspace.experiment)
        logprobs = self._by_copy if quantization is None else self._by_engine
        found = survival(stored.start, stored.trained, logprobs(stored))
        progress(len(stored.rows))
        return {
            "dtype": self._arithmetic if quantization is None else quantization,
            **dataclasses.asdict(found),
        }

    @property
    def _arithmetic(self) -> str:
        """In which precision the engine multiplies the policy's weights."""
        return self.step.engine_kind.arithmetic(self.step.workspace.experiment.model.dtype)

    def _by_engine(self, stored: LogprobComparison) -> list[float]:
        """Log-probs by the engine itself: the quantised weights exist nowhere else."""
        rows = [LogprobRequest(tuple(prompt), tuple(tokens)) for prompt, tokens in stored.rows]
        found = self.step.engine().logprobs(rows, temperature=stored.temperature)
        return [float(value) for value in found]

    def _by_copy(self, stored: LogprobComparison) -> list[float]:
        """Log-probs of the copy that the engine loads, in float32 arithmetic."""
        from qrpo_core.data.collator import Example
        from qrpo_core.models.precision import pick_device
        from qrpo_core.training.survival import float32_logprobs

        self.step.workspace.close()  # the engine's memory; it is loaded anew where it draws
        device = pick_device()
        model = load_copy(self.step.policy, self._arithmetic, self.step.adapters).to(device)
        rows = [Example(*row) for row in stored.rows]
        return float32_logprobs(model, rows, device, stored.temperature)


def engine_copy_of(step: object) -> EngineCopy | None:
    """What has to be measured before a step draws; None where it draws from no policy trained here."""
    if not isinstance(step, SampleStep) or not step.engine_kind.loads_policy:
        return None
    train = step.policy.artifact
    return None if train is None or LOGPROB_COMPARISON not in train.files else EngineCopy(step, train)


def summary(facts: Mapping[str, Any]) -> str:
    """One line of what was measured."""
    return f"drawn from a {facts['dtype']} copy of the policy: {survival_text(facts)}"


def load_copy(policy: Policy, arithmetic: str, adapters: Path | None) -> Any:
    """The model whose weights are those that an engine computes with, as float32."""
    from qrpo_core.models.loading import load_model
    from qrpo_core.models.rounding import engine_directory
    from qrpo_core.training.lora import load_adapters

    base = policy if adapters is None or policy.start is None else policy.start
    model = load_model(engine_directory(base.directory, arithmetic), arithmetic).float()
    return model if adapters is None else load_adapters(model, adapters, arithmetic)
