"""Reference log-probs from the sampler (training_data.reference_logprobs), and whether they will do.

The engine that draws a completion knows the log-probs of its tokens. Their sum is log pi_ref at temperature
1, in the sampler's arithmetic. Training fits beta (log pi - log pi_ref) to a target, so a difference d of
log pi_ref moves the target by beta d. The training model computes some rows of each engine, too, and

    rms(beta d) <= parity.reference_limit x (standard deviation of the targets)

must hold on them, for every engine by itself. At the default, 0.05, the differences add 0.25 % to the
variance of the targets. Training rows are compared, by the numbers that were stored when they were drawn: a
template, an end token or a kernel that differs shows here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import EngineError
from qrpo_core.common.formatting import percent
from qrpo_core.common.hashing import tie_seed
from qrpo_core.common.schemas import COMPARED_LOGPROBS, COMPLETIONS, LOGPROBS
from qrpo_core.config import Experiment
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.store.blocks.planning import Wanted

if TYPE_CHECKING:
    from qrpo_core.pipeline.completions import Completions
    from qrpo_core.pipeline.row_steps import LogprobStep

#: In a training set: COMPARED_LOGPROBS rows.
FILE = "compared_logprobs.parquet"

_REMEDY = "set training_data.reference_logprobs to policy, which computes them with the training model"


@dataclass(frozen=True)
class EngineDifference:
    """How far an engine's log-probs of completions are from the training model's.

    rows : compared completions. rms, largest : of the differences, nats. share : rms(beta x difference) over
        the standard deviation of the targets.
    """

    engine: str
    rows: int
    rms: float
    largest: float
    share: float


def rows_to_compare(experiment: Experiment, round_number: int) -> int:
    """Rows of each engine to compare; 0 where the training model computes all reference log-probs.

    Later rounds draw from the trained policy, whose log-probs are not the reference policy's.
    """
    wanted = experiment.training_data.reference_logprobs == "sampler" and round_number == 1
    return experiment.parity.reference_rows if wanted else 0


def some_of_each_engine(completions: Completions | None, rows: Wanted, count: int) -> Wanted:
    """At most `count` of the rows of each engine, by a hash of their ids: the same in every run.

    completions : None where nothing is drawn yet; one engine is assumed then.
    """
    pairs = [(prompt, index) for prompt, indices in rows.items() for index in indices]
    pairs.sort(key=lambda pair: (tie_seed(*pair), pair))
    engines = [""] * len(pairs) if completions is None else _engines(completions, pairs)
    left = dict.fromkeys(engines, count)
    found: dict[str, list[int]] = {}
    for (prompt, index), engine in zip(pairs, engines, strict=True):
        if left[engine]:
            left[engine] -= 1
            found.setdefault(prompt, []).append(index)
    return {prompt: tuple(sorted(indices)) for prompt, indices in sorted(found.items())}


def _engines(completions: Completions, pairs: Sequence[tuple[str, int]]) -> list[str]:
    few = pa.schema([COMPLETIONS.field(name) for name in ("prompt_id", "sample_index", "engine")])
    rows = completions.workspace.blocks.read_rows(completions.recipe, pairs, few)
    engines: list[str] = rows["engine"].to_pylist()
    return engines


def reported(pairs: Sequence[tuple[str, int]], drawn: pa.Table) -> pa.ChunkedArray:
    """The log-probs that the sampler gave, nats. drawn : COMPLETIONS rows of `pairs`.

    Raises EngineError where an engine gave none.
    """
    column = drawn["logprob"]
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise EngineError(
            f"{column.null_count} of {len(pairs)} completions have no log-prob of the sampler",
            where=f"prompt {pairs[row][0]}, sample {pairs[row][1]}, engine {drawn['engine'][row].as_py()}",
            remedy=_REMEDY,
        )
    return column


def compare(logprobs: LogprobStep) -> pa.Table:
    """COMPARED_LOGPROBS of the rows that the step computes."""
    completions = logprobs.completions
    pairs = [(prompt, index) for prompt, indices in logprobs.wanted.items() for index in indices]
    drawn = completions.read(pairs)
    scored = completions.workspace.blocks.read_rows(logprobs.recipe, pairs, LOGPROBS)
    return pa.table(
        {
            "prompt_id": [prompt for prompt, _ in pairs],
            "sample_index": [index for _, index in pairs],
            "engine": drawn["engine"],
            "sampler": reported(pairs, drawn),
            "policy": scored["logprob"],
        }
    ).cast(COMPARED_LOGPROBS)


def differences(
    compared: pa.Table, table: pa.Table, targets: CalibratedTargets
) -> tuple[EngineDifference, ...]:
    """The differences of each engine, by name; infinite where none of its compared rows has a target.

    compared : COMPARED_LOGPROBS rows. table : the TRAINING_SET rows of `targets`; prompts with too few
        references have none.
    """
    rows = zip(*(table[name].to_pylist() for name in ("prompt_id", "sample_index")), strict=True)
    beta = dict(zip(rows, targets.beta.tolist(), strict=True))
    found: dict[str, list[tuple[float, float]]] = {}
    for row in compared.to_pylist():
        nats, of_engine = row["sampler"] - row["policy"], found.setdefault(row["engine"], [])
        if (key := (row["prompt_id"], row["sample_index"])) in beta:
            of_engine.append((nats, beta[key] * nats))
    # tup asks for probability 0 with -inf.
    spread = float(targets.target[np.isfinite(targets.target)].std())
    return tuple(_difference(engine, each, spread) for engine, each in sorted(found.items()))


def _difference(engine: str, rows: Sequence[tuple[float, float]], spread: float) -> EngineDifference:
    """rows : differences in nats and times beta. spread : the standard deviation of the targets."""
    if not rows:
        return EngineDifference(engine, 0, math.inf, math.inf, math.inf)
    nats, scaled = np.array(rows).T
    rms, moved = float(np.sqrt(np.mean(nats**2))), float(np.sqrt(np.mean(scaled**2)))
    share = moved / spread if spread else math.inf if moved else 0.0
    return EngineDifference(engine, len(rows), rms, float(np.abs(nats).max()), share)


def refuse_far(compared: Sequence[EngineDifference], limit: float) -> None:
    """Raise EngineError where an engine's differences are not small beside the targets."""
    for each in compared:
        if not each.share <= limit:
            raise EngineError(
                f"the sampler's log-probs are no reference log-probs here: they differ from the training "
                f"model's by {each.rms:.3g} nats (root mean square), times beta {percent(each.share)} of the "
                f"targets' standard deviation; parity.reference_limit is {percent(limit)}",
                where=f"{each.rows} completions by {each.engine}",
                remedy=_REMEDY,
            )


def summary(compared: Sequence[EngineDifference]) -> str:
    """One line: whose log-probs they are and how far each engine's are from the training model's."""
    each = (
        f"{one.engine} differs by {one.rms:.2g} nats (root mean square of {one.rows} completions, largest "
        f"{one.largest:.2g}), times beta {percent(one.share)} of the targets' standard deviation"
        for one in compared
    )
    return f"the sampler's; {'; '.join(each)}"
