"""A few rows, sampled and scored first: a reward that fails on every row then costs seconds.

They are ordinary rows of their recipes and are computed once. Where all of them fail, the run ends with their
common error, and their rewards are not kept, so that the next run scores them again. Equal rewards prove
nothing on so few rows; `pipeline.learning_signal` looks at all rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import QRPOError
from qrpo_core.common.progress import Progress
from qrpo_core.config.rewards import has_kind
from qrpo_core.engines.kinds import kind_of
from qrpo_core.pipeline.learning_signal import status_facts, unscored
from qrpo_core.pipeline.row_steps import BlockStep, RewardStep, SampleStep
from qrpo_core.pipeline.shards import PartOfStep, ShardStep
from qrpo_core.pipeline.stage_names import ANNOTATE_REFERENCES
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import TRIAL
from qrpo_core.store.blocks.planning import BlockPlan, Wanted, count_rows

#: Rows that are tried, and the fewest that prove anything.
ROWS, FEWEST = 8, 4
#: The run ends if all rows failing by chance, at the success rate `min_scored`, is less likely than this.
_CHANCE = 0.01


@dataclass(frozen=True)
class FewRows(PartOfStep):
    """A step restricted to a few of its rows."""

    wanted: Wanted

    @property
    def label(self) -> str:
        return f"{self.step.label}, first rows"

    def compute(self, plan: BlockPlan, progress: Progress) -> tuple[pa.Table, dict[str, Any]]:
        """The rows as the step computes them; QRPOError where every reward is missing (`refuse_failing`)."""
        table, facts = self.step.compute(plan, progress)
        if isinstance(self.step, RewardStep):
            refuse_failing(table, self.step.completions.workspace.experiment.training_data.min_scored)
        return table, facts | {TRIAL: True}


def first_rows_steps(step: BlockStep) -> tuple[FewRows, ...]:
    """The steps to take before the missing rows of `step` are computed; none where there is nothing to try.

    Tried is the experiment's reward on completions of the reference policy or of the data set, while no row
    has been scored with it. Where it loads a model, trying it would close the engine: such a reward is not
    tried where that takes a minute to come back, as vLLM does.
    """
    whole = step.step if isinstance(step, ShardStep) else step
    rewards = _rewards_of(whole)
    if rewards is None:
        return ()
    workspace = rewards.completions.workspace
    experiment = workspace.experiment
    if kind_of(experiment).slow_start and has_kind(experiment.reward, "model"):
        return ()
    if workspace.blocks.committed(rewards.recipe):
        return ()
    few = _first_rows(_drawn_first(workspace.blocks, step, ROWS), min(ROWS, experiment.store.rows_per_block))
    if count_rows(few) < FEWEST:
        return ()
    prompts = {key.partition(".")[0]: rows for key, rows in few.items()}
    keys = ((key, key.partition(".")[0]) for key in rewards.wanted)
    scored = FewRows(rewards, {key: prompts[prompt] for key, prompt in keys if prompt in prompts})
    return (FewRows(whole, few), scored) if isinstance(whole, SampleStep) else (scored,)


def _rewards_of(step: BlockStep) -> RewardStep | None:
    """What scores the rows of a step with the experiment's reward; None where it is not to be tried."""
    if isinstance(step, SampleStep):
        return RewardStep(step, ANNOTATE_REFERENCES) if step.policy.start is None else None
    if not isinstance(step, RewardStep) or step.scorer is not None:
        return None
    drawn = step.completions
    return None if isinstance(drawn, SampleStep) and drawn.policy.start is not None else step


def _drawn_first(blocks: BlockStore, step: BlockStep, count: int) -> Wanted:
    """The wanted rows of keys that have stored rows, and of `count` others, drawn anew in each run.

    So two runs at once try different rows, and a run after a failed one draws no more than that had drawn.
    """
    wanted = step.wanted
    stored = {key for block in blocks.committed(step.recipe) for key in block.ranges.keys if key in wanted}
    return {key: wanted[key] for key in (*stored, *random.sample(list(wanted), min(count, len(wanted))))}


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
            remedy="repair it and run again; the drawn samples are kept, and no more were drawn",
        )
