"""What a comparison is computed from: every measure of every training on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.comparison import Observed, length_slope
from qrpo_core.evaluation.inputs import EVALUATED_AFTER, Floats, floats, strings
from qrpo_core.pipeline.evaluation import EvaluationSteps, HeldOutSteps
from qrpo_core.pipeline.joined_rewards import joined_rewards
from qrpo_core.pipeline.workspace import Workspace

#: The means over the completions of one prompt. measure : `reward`, `judge NAME`, `log_ratio` (nats),
#: `tokens` or `cut`. before, after : the reference policy's and the variant's; null without a reward.
COMPARED = pa.schema(
    [
        pa.field("variant", pa.string(), False),
        pa.field("seed", pa.int64(), False),
        pa.field("prompt_id", pa.string(), False),
        pa.field("measure", pa.string(), False),
        pa.field("before", pa.float64()),
        pa.field("after", pa.float64()),
    ]
)

#: Measures that are no scorer's.
_OTHERS = ("log_ratio", "tokens", "cut")


@dataclass(frozen=True)
class VariantRun:
    """One training of a variant. evaluated : its evaluation; None where `error` ended it."""

    variant: str
    seed: int
    evaluated: EvaluationSteps | None
    error: str = ""

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Measured:
    """Every measure of the trainings, means over the completions of each prompt.

    measures : `reward`, the judges in order, `log_ratio`, `tokens`, `cut`. slopes : by scorer, what a token
        more brings among the reference policy's completions.
    """

    prompts: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    measures: Mapping[str, Observed]
    slopes: Mapping[str, float | None]

    @classmethod
    def of(cls, workspace: Workspace, runs: Sequence[VariantRun]) -> Measured:
        """Read what the trainings left in the store. At least one has an evaluation."""
        variants = tuple(dict.fromkeys(run.variant for run in runs))
        seeds = tuple(sorted({run.seed for run in runs}))
        done = [(run, run.evaluated) for run in runs if run.evaluated is not None]
        tables = _tables(workspace, done[0][1], "before")
        prompts = tuple(sorted(set(strings(tables["reward"], "prompt_id").tolist())))
        before = _means(tables, prompts) | {"log_ratio": np.zeros(len(prompts))}
        empty = np.full((len(variants), len(seeds), len(prompts)), np.nan)
        after = {name: empty.copy() for name in (*tables, *_OTHERS)}
        for run, steps in done:
            found = _means(_tables(workspace, steps, "after"), prompts)
            for name, numbers in found.items():
                after[name][variants.index(run.variant), seeds.index(run.seed)] = numbers
        measures = {name: Observed(before[name], numbers) for name, numbers in after.items()}
        slopes = {name: _slope(table) for name, table in tables.items()}
        return cls(prompts, variants, seeds, measures, slopes)

    @property
    def scorers(self) -> list[str]:
        """The measures that are scores: the reward, then the judges."""
        return [name for name in self.measures if name not in _OTHERS]

    def silent(self, scorer: str) -> dict[str, int]:
        """Variant → its trained policies without any score by this scorer, where there are some."""
        trained = self.measures["log_ratio"].trained  # every trained policy has log-probs
        counts = (trained & ~self.measures[scorer].trained).sum(axis=1)
        return {name: int(count) for name, count in zip(self.variants, counts, strict=True) if count}

    def rows(self) -> pa.Table:
        """COMPARED rows."""
        tables = [table for name in self.measures for table in self._rows_of(name)]
        return pa.concat_tables(tables) if tables else COMPARED.empty_table()

    def _rows_of(self, measure: str) -> Iterator[pa.Table]:
        seen = self.measures[measure]
        before = pa.array(seen.before, from_pandas=True)
        for (place, number), trained in np.ndenumerate(seen.trained):
            if trained:
                count = len(self.prompts)
                columns = [
                    pa.array([self.variants[place]] * count),
                    pa.array([self.seeds[number]] * count, pa.int64()),
                    pa.array(self.prompts),
                    pa.array([measure] * count),
                    before,
                    pa.array(seen.after[place, number], from_pandas=True),
                ]
                yield pa.table(columns, schema=COMPARED)


def refuse_silent_scorers(before: HeldOutSteps) -> None:
    """Raise DataError, with their names, for scorers without a score on the reference policy's completions.

    before : the evaluation of the reference policy, whose rows are computed.
    """
    steps = {"reward": before.rewards} | {f"evaluation.judges.{name}": s for name, s in before.judges.items()}
    silent = [name for name, step in steps.items() if not _scored(joined_rewards(step))]
    if silent:
        raise DataError(
            f"no held-out completion of the reference policy has a score by {', '.join(silent)}",
            where="held-out, before",
            remedy="see the statuses of its rows (qrpo explain EXPERIMENT PROMPT_ID); nothing was trained",
        )


def _scored(table: pa.Table) -> bool:
    return bool(np.isfinite(floats(table, "reward")).any())


def judge_measure(name: str) -> str:
    """The name of a judge among the measures."""
    return f"judge {name}"


def _tables(workspace: Workspace, steps: EvaluationSteps, when: str) -> dict[str, pa.Table]:
    """The evaluated rows by scorer; after training, those of the reward with both log-probs."""
    side = steps.before if when == "before" else steps.after
    tables = {"reward": joined_rewards(side.rewards)}
    if when == "after":
        tables["reward"] = workspace.load(
            workspace.artifacts.get(steps.evaluate), "after.parquet", EVALUATED_AFTER
        )
    judged = {judge_measure(name): joined_rewards(step) for name, step in side.judges.items()}
    return tables | judged


def _means(tables: Mapping[str, pa.Table], prompts: Sequence[str]) -> dict[str, Floats]:
    """Means over the completions of each prompt, NaN without a reward, by measure."""
    found = {name: _mean(table, floats(table, "reward"), prompts) for name, table in tables.items()}
    table = tables["reward"]
    if "policy_logprob" in table.column_names:
        ratio = floats(table, "policy_logprob") - floats(table, "ref_logprob")
        found["log_ratio"] = _mean(table, ratio, prompts)
    found["tokens"] = _mean(table, floats(table, "num_tokens"), prompts)
    cut = (strings(table, "finish_reason") == "length").astype(np.float64)
    return found | {"cut": _mean(table, cut, prompts)}


def _mean(table: pa.Table, numbers: Floats, prompts: Sequence[str]) -> Floats:
    place = np.searchsorted(np.asarray(prompts), strings(table, "prompt_id"))
    ok = np.isfinite(numbers)
    sums = np.bincount(place[ok], weights=numbers[ok], minlength=len(prompts))
    counts = np.bincount(place[ok], minlength=len(prompts))
    with np.errstate(invalid="ignore"):
        return np.asarray(sums / counts)


def _slope(table: pa.Table) -> float | None:
    prompts: list[str] = table["prompt_id"].to_pylist()
    return length_slope(prompts, floats(table, "reward"), floats(table, "num_tokens"))
