"""The probe of `qrpo plan --probe`: measure each kind of work here, and keep the rates in the store.

Some rows of the experiment are drawn, scored and given log-probs, and a few optimiser steps are taken. The
rows are kept as any others, so nothing is computed twice; the trained steps are thrown away. Every kind of
work gets a part of a minute, beside loading, which is measured apart.

Rows of one prompt share its tokens, so what a row takes depends on how many its prompt has. Blocks of all
rows of few prompts and one block of one row of many prompts tell the time of a prompt from that of a row.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from qrpo_core.common.local_copies import Hold
from qrpo_core.common.progress import Progress
from qrpo_core.config import RewardConfig
from qrpo_core.inspection.memory import policy_shape
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.rates import ProbedRate, model_facts, rate_key, write_rate
from qrpo_core.inspection.stage_work import StageWork, work_of
from qrpo_core.maintenance.in_use import known_prompts, steps_of
from qrpo_core.models.template_clock import today
from qrpo_core.pipeline import policies, stage_names
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.first_rows import FewRows
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_recipes import LogprobSettings
from qrpo_core.pipeline.row_steps import BlockStep, LogprobStep, RewardStep, SampleStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import Wanted

#: Seconds for rows of one kind; training takes _STEPS steps, however long they are.
SECONDS: Mapping[str, float] = {"sample": 15.0, "reward": 4.0, "log-probs": 5.0}
_STEPS = 3
#: Rows of the first block, in which everything is loaded, and of the first block that is timed. They double.
_FIRST, _TIMED = 8, 32
#: Most rows of a block, which fill an engine that runs many sequences at once.
_MOST = 1024
#: Prompts with one row each that are timed at most, and the fewest that tell something.
_WIDE, _FEWEST = 128, 16
#: How many times dearer a row alone of its prompt may be: so much shorter is their block.
_DEARER = 4.0


@dataclass
class Timing:
    """Seconds before the first row, of each row and of each prompt; the rows timed, their mean tokens."""

    startup: float
    row: float
    rows: int
    tokens: float | None = None
    prompt: float = 0.0


@dataclass(frozen=True)
class Block:
    """A block that was computed: its rows, how many prompts they have, and its seconds."""

    rows: int
    prompts: int
    seconds: float
    tokens: float | None


def fitted(first: Block, deep: Block, wide: Block | None) -> Timing:
    """What blocks say of the time of a row and of a prompt.

    first : in which everything was loaded. deep : the last one with all rows of its prompts.
    wide : one row of each of its prompts, or None; then the time of a prompt is part of a row's.
    """
    row, prompt = deep.seconds / deep.rows, 0.0
    share = deep.prompts / deep.rows
    if wide is not None and share < 1:
        alone = wide.seconds / wide.rows
        prompt = min(max(0.0, (alone - row) / (1 - share)), row / share)
        row = max(0.0, row - share * prompt)
    expected = first.rows * row + first.prompts * prompt
    startup = max(0.0, first.seconds - expected) if deep is not first else 0.0
    return Timing(startup, row, deep.rows, deep.tokens, prompt)


def probe(workspace: Workspace, progress: Progress) -> None:
    """Measure on this machine, and keep the rates and the drawn rows in the store."""
    source = policies.source_of(workspace)
    if source.needs_conversion:
        policies.convert(workspace, source)
    asked, tables = known_prompts(workspace)
    reference = policies.reference(workspace, source)
    assert reference is not None  # it has just been converted
    _Probe(workspace, steps_of(workspace, asked, tables), reference, progress).run()


@dataclass
class _Probe:
    workspace: Workspace
    known: ExperimentSteps
    reference: Policy
    progress: Progress

    def run(self) -> None:
        samples = self._samples()
        drawn: dict[str, list[int]] = {}
        self._keep("sample", work_of(self._experiment, samples.label), self._time("sample", samples, drawn))
        for scorer in (self._experiment.reward, *self._experiment.evaluation.judges.values()):
            self._reward(samples, scorer, drawn)
        self._logprobs(samples, drawn)
        rows = self._rows(samples, drawn)
        if rows:
            self._train(rows)

    @property
    def _experiment(self) -> Any:
        return self.workspace.experiment

    def _samples(self) -> SampleStep:
        """The references, or the held-out completions where none are drawn."""
        drawn = (step for step in self.known.first.row_steps if isinstance(step, SampleStep))
        return next(drawn, self.known.before.samples)

    def _time(self, kind: str, step: BlockStep, drawn: dict[str, list[int]] | None = None) -> Timing | None:
        """Compute missing rows of a step for some seconds; None where the store has them all.

        drawn : gets the rows that were computed.
        """
        several = {key: rows for key, rows in step.wanted.items() if len(rows) > 1}
        blocks: list[Block] = []
        began, rows = time.monotonic(), _FIRST
        while not blocks or time.monotonic() - began < SECONDS[kind] + blocks[0].seconds:
            block = self._block(step, several or step.wanted, rows, drawn)
            if block is None:
                break
            rows = _TIMED if not blocks else min(2 * rows, _MOST)
            blocks.append(block)
        if not blocks:
            return None
        alone = (
            {}
            if kind == "reward"
            else self._alone(step, SECONDS[kind] * blocks[-1].rows / blocks[-1].seconds)
        )
        wide = self._block(step, alone, _WIDE, drawn) if len(alone) >= _FEWEST else None
        return fitted(blocks[0], blocks[-1], wide)

    def _alone(self, step: BlockStep, affordable: float) -> Wanted:
        """One missing row of each of many prompts. affordable : rows that take the time of this kind."""
        most = min(_WIDE, max(_FEWEST, int(affordable / _DEARER)))
        found: dict[str, range] = {}
        for each in self.workspace.blocks.missing(step.recipe, step.wanted).absent:
            if len(found) < most:
                found.setdefault(each.key, range(each.first, each.first + 1))
        return found

    def _block(
        self, step: BlockStep, wanted: Wanted, rows: int, drawn: dict[str, list[int]] | None
    ) -> Block | None:
        """Compute and keep the next missing ones of the wanted rows, at most so many; None without any."""
        plans = self.workspace.blocks.plan(step.recipe, wanted, rows)
        if not plans:
            return None
        wanted = {each.key: range(each.first, each.first + each.count) for each in plans[0].ranges}
        few = FewRows(step, wanted)
        started = time.monotonic()
        table, facts = few.compute(plans[0], self.progress)
        seconds = time.monotonic() - started
        self.workspace.blocks.commit(plans[0], table, step.schema, seconds, **facts)
        if drawn is not None:
            for key, index in plans[0].row_ids():
                drawn.setdefault(key, []).append(index)
        tokens = facts["tokens"] / len(table) if "tokens" in facts else None
        return Block(len(table), len(wanted), seconds, tokens)

    def _reward(self, samples: SampleStep, scorer: RewardConfig, drawn: Mapping[str, list[int]]) -> None:
        step = RewardStep(samples, "probe", None if scorer == self._experiment.reward else scorer, drawn)
        self._keep("reward", StageWork("reward", self._experiment, scorer), self._time("reward", step))

    def _logprobs(self, samples: SampleStep, drawn: Mapping[str, list[int]]) -> None:
        """In the trainer's arithmetic, and in that of the KL where this device computes it differently."""
        from qrpo_core.models.precision import native_bfloat16, pick_device

        step = LogprobStep(samples, self.reference, "probe", rows=drawn)
        found = self._time("log-probs", step)
        label = stage_names.SCORE_REFERENCE_LOGPROBS
        self._keep("log-probs", work_of(self._experiment, label), found)
        kl = work_of(self._experiment, f"{label}, after")
        if native_bfloat16(pick_device()) and kl.precision != work_of(self._experiment, label).precision:
            settings = LogprobSettings.of_kl(self._experiment)
            found = self._time("log-probs", replace(step, settings=settings))
        self._keep("log-probs", kl, found)

    def _rows(self, samples: SampleStep, drawn: Mapping[str, list[int]]) -> pa.Table | None:
        """The drawn completions; those of the store where none had to be drawn."""
        pairs = [(key, index) for key, found in drawn.items() for index in found]
        if not pairs:
            wanted = samples.wanted
            pairs = [(key, wanted[key][0]) for key in list(wanted)[: 2 * _TIMED]]
        return samples.read(pairs)

    def _train(self, rows: pa.Table) -> None:
        """A few steps, from loading the policy to comparing what was saved."""
        from qrpo_core.common.file_digests import file_digests
        from qrpo_core.models.source import policy_files
        from qrpo_core.training.run import train_policy

        self.workspace.close()
        experiment = self._experiment
        items, tokens = self._items(self._as_trained(rows))
        training = experiment.training.model_copy(
            update={"temperature": experiment.training_temperature, "epochs": 1.0}
        )
        fill = max(1, round(training.micro_batch_tokens / tokens))
        batch = min(training.batch_size, fill)
        training = training.model_copy(update={"batch_size": batch})
        items = [items[place % len(items)] for place in range(_STEPS * batch)]
        times = [time.monotonic()]
        directory = self.reference.directory
        with Hold(directory), tempfile.TemporaryDirectory(prefix="qrpo-probe-") as scratch:
            train_policy(
                items,
                directory,
                Path(scratch) / "policy",
                objective=experiment.objective,
                training=training,
                work=Path(scratch) / "work",
                on_step=lambda *_: times.append(time.monotonic()),
            )
            file_digests(policy_files(Path(scratch) / "policy"))
        whole = time.monotonic() - times[0]
        step = sorted(later - earlier for earlier, later in pairwise(times[1:]))
        sides = 2 if experiment.objective.pairwise else 1
        row = step[len(step) // 2] / (batch * sides)
        startup = max(0.0, whole - _STEPS * batch * sides * row)
        work = work_of(experiment, stage_names.TRAIN_POLICY)
        self._keep("train", work, Timing(startup, row, _STEPS * batch * sides, tokens))

    def _as_trained(self, rows: pa.Table) -> pa.Table:
        """As many rows of a prompt as training has, since they share its tokens; else all of them."""
        per_prompt = max(1, round(self._trained_per_prompt()))
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(rows["prompt_id"].to_pylist()):
            places.setdefault(prompt, []).append(place)
        kept = [place for each in places.values() if len(each) >= per_prompt for place in each[:per_prompt]]
        return rows.take(kept) if kept else rows

    def _trained_per_prompt(self) -> float:
        """Completions of a prompt that training sees; for pairs, pairs."""
        sides = 2 if self._experiment.objective.pairwise else 1
        for stage in plan(self.workspace):
            if stage.stage == stage_names.TRAIN_POLICY:
                return stage.rows_per_prompt / sides
        return 1.0

    def _items(self, rows: pa.Table) -> tuple[list[Any], float]:
        """The rows as items of the trainer, with targets of no meaning, and their mean tokens."""
        from qrpo_core.data.collator import Example, Pair, length

        chat = self.workspace.chat(self.reference.directory)
        table = self.known.prompts
        turns = dict(zip(table["prompt_id"].to_pylist(), table["messages"].to_pylist(), strict=True))
        columns = (rows[name].to_pylist() for name in ("prompt_id", "token_ids"))
        examples = [
            Example(tuple(chat.prompt_token_ids(turns[prompt])), tuple(tokens), target=0.1, ref_logprob=-1.0)
            for prompt, tokens in zip(*columns, strict=True)
        ]
        mean = sum(map(length, examples)) / len(examples)
        if not self._experiment.objective.pairwise:
            return list(examples), mean
        return [Pair(each, each) for each in examples], mean

    def _keep(self, kind: str, work: StageWork, found: Timing | None) -> None:
        if found is None or not found.rows:
            return
        from qrpo_core.models.precision import pick_device

        device = pick_device()
        rate = ProbedRate(
            startup=round(found.startup, 3),
            row=found.row,
            rows=found.rows,
            device=_name(device),
            created=today(),
            tokens=found.tokens,
            prompt=found.prompt,
        )
        source = policies.source_of(self.workspace)
        facts = model_facts(policy_shape(self.workspace), source.identity)
        write_rate(self.workspace.objects, rate_key(work, facts), rate)


def _name(device: Any) -> str:
    """The device in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({torch.get_num_threads()} threads)"
