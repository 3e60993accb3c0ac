"""The expected time, place and store size of what a plan lists as missing.

A time comes from the best source there is: this recipe's blocks in the store; like stages of the plan; other
recipes of the store with the same settings; a probe (`qrpo plan --probe`); a known device. A probe tells the
time of a prompt from that of a row. A rate of the store does not, so it speaks for stages with about as many
rows a prompt, and for others where there is no probe. Each source has a factor by which the time may be off
on either side. They are conventions: 1.5 for a probe is what `benchmarks/plan_times.py` holds it to, and a
known device was measured with other rows on another day.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qrpo_core.common.errors import DamagedError
from qrpo_core.engines.kinds import kind_of
from qrpo_core.inspection.known_rates import (
    ARTIFACT_SECONDS,
    KNOWN,
    LEAST_SECONDS,
    KnownDevice,
    device_here,
    rate_of,
)
from qrpo_core.inspection.memory import policy_shape
from qrpo_core.inspection.rates import model_facts, rate_key, read_rate, same_training
from qrpo_core.inspection.space import policy_bytes
from qrpo_core.inspection.stage_plan import Expected, StagePlan
from qrpo_core.inspection.stage_work import StageWork, work_of
from qrpo_core.maintenance.in_use import known_prompts
from qrpo_core.models.memory import ModelShape
from qrpo_core.pipeline import policies, prompts, stage_names
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.manifest import Manifest

STORE_FACTOR, PROBE_FACTOR, DEVICE_FACTOR = 1.25, 1.5, 2.0
#: A completion that has not been drawn yet is counted at its length limit; it may have half of it.
_SHORTER = 2.0
#: Rows that are scored again after training, and their most (`training.survival`).
_COMPARED = 64
#: Bytes of a token of a prompt whose tokenizer is not asked: English text has about four.
_BYTES_A_TOKEN = 4
#: Bytes of a row in a block, and of each of its tokens: 783 rows of the demo with 27 tokens in the mean,
#: and 3,014 rows of another experiment with 14.
_ROW_BYTES = {"sample": (38.0, 4.9), "reward": (32.0, 0.0), "log-probs": (31.0, 0.0), "train": (0.0, 0.0)}


#: Stages whose rows a prompt differ by no more share a rate of rows.
_ALIKE = 1.5


@dataclass(frozen=True)
class Speed:
    """Seconds before the first row, of each row and of each prompt, a row's mean tokens, and the source."""

    startup: float
    row: float
    source: str
    factor: float
    tokens: float | None = None
    at_most: bool = False
    prompt: float = 0.0

    def seconds(self, rows: float, rows_per_prompt: float) -> float:
        """The time of so many rows, that many of each prompt."""
        return self.startup + rows * (self.row + self.prompt / rows_per_prompt)


@dataclass
class Estimator:
    """Expected costs of a workspace's stages.

    shape : of the model; None where it is not known. device : whose known rates are the last resort.
    prompt_tokens : mean tokens of a training prompt.
    """

    workspace: Workspace
    stages: list[StagePlan]
    shape: ModelShape | None
    device: KnownDevice
    prompt_tokens: float

    def estimated(self) -> list[StagePlan]:
        """The stages with expected costs and store sizes."""
        return [self._of(stage) if stage.missing else stage for stage in self.stages]

    def _of(self, stage: StagePlan) -> StagePlan:
        work = work_of(self.workspace.experiment, stage.stage)
        if work.kind == "artifact":
            return replace(stage, expected=self._artifact(stage), store_bytes=self._bytes(stage, work, None))
        speed = self._speed(stage, work)
        size = self._bytes(stage, work, speed)
        if speed is None:
            return replace(stage, store_bytes=size)
        rows = stage.passes if work.kind == "train" else stage.missing
        seconds = speed.seconds(rows, stage.rows_per_prompt) + self._checks(stage, work)
        low = seconds / speed.factor / (_SHORTER if speed.at_most else 1.0)
        expected = Expected(seconds, low, seconds * speed.factor, speed.source, work.gpus)
        if work.kind in ("sample", "log-probs") and speed.tokens is not None:
            expected = replace(expected, tokens=rows * speed.tokens, at_most=speed.at_most)
        return replace(stage, expected=expected, store_bytes=size)

    def _artifact(self, stage: StagePlan) -> Expected:
        """The time of a stage that makes one artifact: the demo's, since few take more than a second."""
        name = stage.stage.partition(", round ")[0]
        seconds = ARTIFACT_SECONDS.get(name, LEAST_SECONDS)
        if name == stage_names.CONVERT_MODEL and self.shape is not None:
            seconds *= max(1.0, self.shape.parameters / 134_515_008)
        low, high = seconds / DEVICE_FACTOR, seconds * DEVICE_FACTOR
        return Expected(seconds, low, high, "the demo on two CPU cores", 0)

    def _speed(self, stage: StagePlan, work: StageWork) -> Speed | None:
        if stage.rate:
            return Speed(0.0, 1 / stage.rate, "this store", STORE_FACTOR, stage.row_tokens)
        return (
            self._like(stage, work, _ALIKE)
            or self._stored_training(work)
            or self._stored_logprobs(work)
            or self._probed(work)
            or self._like(stage, work, math.inf)
            or self._known(stage, work)
        )

    def _like(self, stage: StagePlan, work: StageWork, most: float) -> Speed | None:
        """The rate of a stage of the plan that does the same, such as sampling from the policy before.

        most : how far their rows a prompt may be apart, as a factor; the nearest is taken.
        """
        found: dict[float, StagePlan] = {}
        for other in self.stages:
            if not other.rate or other is stage:
                continue
            if _same(work, work_of(self.workspace.experiment, other.stage)):
                apart = other.rows_per_prompt / stage.rows_per_prompt if work.kind != "reward" else 1.0
                found.setdefault(max(apart, 1 / apart), other)
        if not found or min(found) > most:
            return None
        nearest = found[min(found)]
        assert nearest.rate is not None
        source = f"this store ({nearest.stage})"
        return Speed(0.0, 1 / nearest.rate, source, STORE_FACTOR, nearest.row_tokens)

    def _stored_training(self, work: StageWork) -> Speed | None:
        """Of the newest training in the store of the same model with the same settings of the trainer."""
        if work.kind != "train":
            return None
        done = [each for each in self._trainings if same_training(work, each.recipe)]
        if not done:
            return None
        newest = max(done, key=lambda made: made.created)
        epochs = newest.recipe["config"]["training"]["epochs"]
        rows = newest.facts["rows"] * (2 if work.experiment.objective.pairwise else 1) * epochs
        return Speed(0.0, newest.seconds / max(rows, 1), "this store", STORE_FACTOR)

    def _stored_logprobs(self, work: StageWork) -> Speed | None:
        """Of log-probs of another policy of this model, in the same arithmetic."""
        if work.kind != "log-probs":
            return None
        for recipe in self.workspace.blocks.all_recipes():
            same = recipe.step == "logprob" and recipe.config.get("precision") == work.precision
            if same and recipe.inputs.get("policy") in self._policies:
                rate = self.workspace.blocks.measured(recipe)
                if rate is not None:
                    return Speed(0.0, 1 / rate, "this store (another policy)", STORE_FACTOR)
        return None

    def _probed(self, work: StageWork) -> Speed | None:
        key = rate_key(work, self._model)
        try:
            found = read_rate(self.workspace.objects, key)
        except DamagedError:
            return None  # a plan needs no probe
        if found is None:
            return None
        return Speed(found.startup, found.row, found.source, PROBE_FACTOR, found.tokens, prompt=found.prompt)

    def _known(self, stage: StagePlan, work: StageWork) -> Speed | None:
        name: str = work.kind
        if work.kind == "sample":
            name = f"sample {work.experiment.sampling.engine}"
        elif work.kind == "reward":
            name = f"reward {(work.scorer or work.experiment.reward).kind}"
        elif work.kind == "log-probs" and work.precision == "fp32":
            name = "log-probs fp32"
        parameters = 0 if self.shape is None else self.shape.parameters
        anchor = rate_of(self.device, name, parameters)
        if anchor is None and name.startswith("reward "):  # most run on the CPU of any machine
            anchor = rate_of(KNOWN["cpu"], name, parameters)
        if anchor is None or (not parameters and anchor.parameters):
            return None
        source = f"known rate of {self.device.name} ({anchor.source})"
        if work.kind == "reward":
            return Speed(0.0, 1 / anchor.rate, source, DEVICE_FACTOR)
        drawn, at_most = self._drawn(stage, work)
        tokens = drawn if work.kind == "sample" else self.prompt_tokens + drawn
        copies = work.gpus if work.kind in ("sample", "train") else 1
        if work.kind == "sample":
            copies //= kind_of(work.experiment).gpus_of_a_copy(work.experiment)
        rate = anchor.rate * max(1, copies)
        return Speed(anchor.startup, tokens / rate, source, DEVICE_FACTOR, tokens, at_most)

    def _drawn(self, stage: StagePlan, work: StageWork) -> tuple[float, bool]:
        """Mean tokens of a completion, and whether that is its limit because none has been drawn."""
        for other in (stage, *self.stages):
            theirs = work_of(self.workspace.experiment, other.stage)
            if other.row_tokens and theirs.kind == "sample":
                return other.row_tokens, False
        return float(work.experiment.sampling.max_new_tokens), True

    def _checks(self, stage: StagePlan, work: StageWork) -> float:
        """Seconds of the comparisons with the training model that belong to a stage of sampling."""
        if work.kind != "sample" or not kind_of(work.experiment).loads_policy:
            return 0.0
        if not stage.stage.endswith(", after"):
            return 0.0
        scoring = work_of(self.workspace.experiment, f"{stage_names.SCORE_POLICY_LOGPROBS}, after")
        found = self._speed(StagePlan("", 0, 1, ""), scoring)
        return 0.0 if found is None else found.seconds(_COMPARED, 1.0)

    def _bytes(self, stage: StagePlan, work: StageWork, speed: Speed | None) -> float:
        if stage.row_bytes is not None:
            return stage.missing * stage.row_bytes
        if self.shape is not None and (work.kind == "train" or stage.stage == stage_names.CONVERT_MODEL):
            training = work.experiment.training
            dtype = training.save_dtype if work.kind == "train" else work.experiment.model.dtype
            return policy_bytes(self.shape.parameters, dtype)
        row, token = _ROW_BYTES.get(work.kind, (0.0, 0.0))
        tokens = 0.0 if speed is None or speed.tokens is None else speed.tokens
        return stage.missing * (row + token * tokens)

    @cached_property
    def _model(self) -> Mapping[str, Any]:
        return model_facts(self.shape, policies.source_of(self.workspace).identity)

    @cached_property
    def _policy_digest(self) -> str | None:
        found = policies.reference(self.workspace, policies.source_of(self.workspace))
        return None if found is None else found.digest

    @cached_property
    def _trainings(self) -> list[Manifest]:
        """The stored trainings of this model."""
        found = (each.manifest for each in self.workspace.artifacts.check_manifests("train"))
        mine = self._policy_digest
        return [m for m in found if isinstance(m, Manifest) and m.recipe["inputs"].get("policy") == mine]

    @cached_property
    def _policies(self) -> set[str | None]:
        """Digests of the model and of what was trained from it."""
        return {self._policy_digest, *(policies.digest_of(each.files) for each in self._trainings)}


def with_expected(
    workspace: Workspace, stages: Iterable[StagePlan], device: KnownDevice | None = None
) -> list[StagePlan]:
    """The stages of a plan with expected costs.

    device : whose known rates are used where nothing was measured; None for that of this machine.
    """
    listed = list(stages)
    if not any(each.missing for each in listed):
        return listed
    _, tables = known_prompts(workspace)
    texts = prompts.of_split(tables.prompts, "train")["messages"].to_pylist()
    sizes = [sum(len(turn["content"].encode()) for turn in turns) for turns in texts]
    mean = sum(sizes) / max(len(sizes), 1) / _BYTES_A_TOKEN
    found = device or device_here()
    return Estimator(workspace, listed, policy_shape(workspace), found, mean).estimated()


def _same(one: StageWork, other: StageWork) -> bool:
    """Whether two stages of rows do the same work on other rows."""
    if one.kind != other.kind or one.kind not in ("sample", "reward", "log-probs"):
        return False
    if one.kind == "reward":
        return one.scorer == other.scorer
    return one.precision == other.precision and one.experiment.sampling == other.experiment.sampling


@dataclass(frozen=True)
class Total:
    """The sum of a plan: seconds and GPU hours with intervals, bytes, and stages without a time."""

    seconds: tuple[float, float, float]
    gpu_hours: tuple[float, float, float]
    store_bytes: float
    unknown: int


def total(stages: Iterable[StagePlan]) -> Total:
    """The sums over the missing parts; the ends of the interval are sums of ends, as if all erred one way."""
    left = [each for each in stages if each.missing]
    known = [each.expected for each in left if each.expected is not None]
    return Total(
        (sum(e.seconds for e in known), sum(e.low for e in known), sum(e.high for e in known)),
        (
            sum(e.gpus * e.seconds for e in known) / 3600,
            sum(e.gpus * e.low for e in known) / 3600,
            sum(e.gpus * e.high for e in known) / 3600,
        ),
        sum(each.store_bytes for each in left),
        len(left) - len(known),
    )
