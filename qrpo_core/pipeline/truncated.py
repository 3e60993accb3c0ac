"""Completions that the length limit cut, and their treatment in training (`training_data.truncated`).

A completion left out of training stays among the references: without it they would be samples of another
policy (docs/reference/method.md, section 8). A completion that counts as wrong has the lowest reward, in
training and as a reference, so that all whole completions rank above it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.config import Experiment
from qrpo_core.pipeline.completions import Rewards

_logger = logging.getLogger("qrpo.quantiles")

#: The treatment of cut completions in words.
_TREATED = {
    "keep": "kept in training",
    "leave_out": "left out of training (they stay among the references)",
    "wrong": "counted as wrong, reward {reward:g}",
}


def truncation_in_words(experiment: Experiment) -> str:
    """The treatment of a cut completion, in words."""
    return _TREATED[experiment.training_data.truncated].format(reward=experiment.truncated_reward or 0.0)


def training_rewards(experiment: Experiment, rewards: Rewards) -> pa.Table:
    """REWARDS rows as training sees them, and a column `cut`: whether the length limit ended the completion.

    With training_data.truncated `wrong` a cut one has status ok and the lowest reward, whatever its scorer
    said. Raises ObjectiveError where a whole completion has a lower one: it would lose to a cut one.
    """
    table = rewards.read()
    keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    cut = rewards.completions.cut(list(keys))
    table = table.append_column("cut", cut)
    wrong = experiment.truncated_reward
    if wrong is None:
        return table
    whole = table.filter(pc.and_(pc.equal(table["status"], "ok"), pc.invert(table["cut"])))
    lowest = pc.min(whole["reward"]).as_py()
    if lowest is not None and lowest < wrong:
        raise ObjectiveError(
            f"training_data.truncated_reward {wrong:g} is above {lowest:g}, the reward of a whole "
            "completion, which would lose to a cut one",
            where="training_data.truncated 'wrong'",
            remedy=f"set training_data.truncated_reward to {lowest:g} or less",
        )
    for name, value in (("reward", pa.scalar(wrong, pa.float64())), ("status", "ok"), ("detail", "")):
        column = pc.if_else(table["cut"], value, table[name])
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table


def require_whole(experiment: Experiment, table: pa.Table) -> None:
    """Raise ObjectiveError where nothing is left to train on because everything was cut."""
    if experiment.training_data.truncated == "leave_out" and len(table) and pc.all(table["cut"]).as_py():
        raise ObjectiveError(
            f"all {len(table)} training completions are cut by the length limit, and so left out",
            where="training_data.truncated 'leave_out'",
            remedy="raise sampling.max_new_tokens",
        )


def cut_facts(experiment: Experiment, table: pa.Table, references: pa.Table | None) -> dict[str, Any]:
    """The numbers of cut completions and references, as facts of an artifact. Warns if many are cut.

    references : the same table as `table` if the training completions are the references; None for none.
    The fact `selected` is true if cut completions were left out. The rest are no draws from the policy then.
    """
    alone = references is None or references is table
    cut = {"completions" if alone else "training completions": _counted(table)}
    if references is not None and references is not table:
        cut["references"] = _counted(references)
    for name, found in cut.items():
        if (line := many_cut(experiment, name, found)) is not None:
            _logger.warning(line)
    left_out = experiment.training_data.truncated == "leave_out" and bool(pc.any(table["cut"]).as_py())
    return {"cut": cut, "selected": left_out}


def _counted(table: pa.Table) -> dict[str, int]:
    return {"cut": pc.sum(table["cut"]).as_py() or 0, "of": len(table)}


def many_cut(experiment: Experiment, name: str, found: Mapping[str, int]) -> str | None:
    """A sentence where all are cut, or more than training_data.truncated_warning. found : see `cut_facts`."""
    share = found["cut"] / max(found["of"], 1)
    if share <= experiment.training_data.truncated_warning and share < 1:
        return None
    some = f"{found['cut']:,} of {found['of']:,}" if found["cut"] < found["of"] else f"All {found['of']:,}"
    return (
        f"{some} {name} are cut by the length limit, and {truncation_in_words(experiment)}; raise "
        "sampling.max_new_tokens, or set training_data.truncated."
    )
