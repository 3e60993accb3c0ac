"""A few rows, drawn and scored before the bulk is drawn: a reward that fails on every row then costs seconds.

They are ordinary rows of their recipes and are never bought again. Where all of them fail, their rewards are
not kept, so that the next run tries them anew, and the run ends with the error that they have in common.
Equal rewards prove nothing on so few rows: whether there is a signal is asked of all (`steps.signal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qrpo_core.engines.base import Progress
from qrpo_core.errors import QRPOError
from qrpo_core.rewards.config import has_kind
from qrpo_core.steps.blocks import BlockStep, RewardStep, SampleStep
from qrpo_core.steps.shares import PartOfStep, ShareStep
from qrpo_core.steps.signal import status_facts, unscored
from qrpo_core.store.block_manifest import TRIAL
from qrpo_core.store.blocks import BlockPlan, Wanted, count_rows

#: Rows that are tried, and the fewest that prove anything.
ROWS, FEWEST = 8, 4
#: Chance of the tried rows all failing, were as many scored as `min_scored` asks for, below which a run ends.
_CHANCE = 0.01


@dataclass(frozen=True)
class FewRows(PartOfStep):
    """A step that is asked for a few of its rows."""

    wanted: Wanted

    @property
    def label(self) -> str:
        return f"{self.step.label}, first rows"

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """As the step computes them. Rewards that are all missing are a QRPOError: see `refuse_failing`."""
        table, facts = self.step.compute(plan, progress)
        if isinstance(self.step, RewardStep):
            refuse_failing(table, self.step.completions.workspace.experiment.training_data.min_scored)
        return table, facts | {TRIAL: True}


def trial(step: BlockStep) -> tuple[FewRows, ...]:
    """The steps to take before the missing rows of `step` are computed; none where there is nothing to try.

    Tried is the experiment's reward on completions of the reference policy or of the data set, while no row
    has been scored with it. Where it loads a model, trying it would close vLLM's engine, which takes a minute
    to come back: such a reward is not tried there.
    """
    whole = step.step if isinstance(step, ShareStep) else step
    rewards = _rewards_of(whole)
    if rewards is None:
        return ()
    workspace = rewards.completions.workspace
    experiment = workspace.experiment
    if experiment.sampling.engine == "vllm" and has_kind(experiment.reward, "model"):
        return ()
    few = _first_rows(step.wanted, min(ROWS, experiment.store.rows_per_block))
    if count_rows(few) < FEWEST or workspace.blocks.committed(rewards.recipe):
        return ()
    prompts = {key.partition(".")[0]: rows for key, rows in few.items()}
    keys = ((key, key.partition(".")[0]) for key in rewards.wanted)
    scored = FewRows(rewards, {key: prompts[prompt] for key, prompt in keys if prompt in prompts})
    return (FewRows(whole, few), scored) if isinstance(whole, SampleStep) else (scored,)


def _rewards_of(step: BlockStep) -> RewardStep | None:
    """What scores the rows of a step with the experiment's reward; None where it is not to be tried."""
    if isinstance(step, SampleStep):
        return RewardStep(step, "score references") if step.policy.start is None else None
    if not isinstance(step, RewardStep) or step.scorer is not None:
        return None
    drawn = step.completions
    return None if isinstance(drawn, SampleStep) and drawn.policy.start is not None else step


def _first_rows(wanted: Wanted, rows: int) -> dict[str, list[int]]:
    """The first sample of the first keys, then the second of each, until there are so many rows."""
    found: dict[str, list[int]] = {}
    taken = [(place, key) for key in list(wanted)[:rows] for place in range(min(rows, len(wanted[key])))]
    for place, key in sorted(taken, key=lambda each: each[0])[:rows]:
        found.setdefault(key, []).append(wanted[key][place])
    return found


def refuse_failing(rewards: pa.Table, min_scored: float) -> None:
    """Raise QRPOError where no row has a reward and that is no accident; REWARDS rows of a trial.

    It is none where every row failed in the same way, or where so many failures in a row are not to be
    expected of a reward that scores the share `min_scored`. With `min_scored` 0 nothing is refused.
    """
    statuses = status_facts(rewards)
    if "ok" in statuses or not min_scored:
        return
    alike = len(statuses) == 1 and next(iter(statuses.values()))["times"] == len(rewards)
    if alike or (1 - min_scored) ** len(rewards) < _CHANCE:
        raise QRPOError(
            f"the reward fails on each of the first {len(rewards)} rows: {unscored(statuses)}",
            where="reward",
            remedy="mend it and run again; nothing more was drawn, and what was drawn is kept",
        )
