"""Whether a policy can learn from the rewards, checked before training.

The checks read the facts of the quantiles' artifact, so a changed limit recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import RETRYABLE
from qrpo_core.config import Experiment
from qrpo_core.rewards.base import SCORER_RAISED, clip
from qrpo_core.rewards.thinking import UNFINISHED

#: The facts of the quantiles that count rows by status, and whose rows they are.
STATUSES = {
    "statuses": "training completions",
    "reference_statuses": "references",
    "own_statuses": "completions of the data set",
}
#: Longest detail that an error quotes of a status.
_DETAIL = 200


def status_facts(rewards: pa.Table) -> dict[str, dict[str, Any]]:
    """The number of REWARDS rows by status, each with its commonest detail and the number of its rows."""
    found: dict[str, dict[str, Any]] = {}
    for row in rewards["status"].value_counts().to_pylist():
        details = rewards.filter(pc.equal(rewards["status"], row["values"]))["detail"]
        most = max(details.value_counts().to_pylist(), key=lambda each: each["counts"])
        found[row["values"]] = {"count": row["counts"], "detail": most["values"], "times": most["counts"]}
    return found


def remarked(rewards: pa.Table) -> dict[str, int]:
    """The number of REWARDS rows graded wrong without an answer: endless thinking, or the scorer raised."""
    details = rewards.filter(pc.equal(rewards["status"], "ok"))["detail"]
    return {
        "unfinished_thinking": pc.sum(pc.equal(details, UNFINISHED)).as_py() or 0,
        "scorer_raised": pc.sum(pc.starts_with(details, SCORER_RAISED)).as_py() or 0,
    }


def unscored(statuses: Mapping[str, Mapping[str, Any]]) -> str:
    """The statuses of the rows without a reward, the commonest first, each with its commonest detail.

    endpoint_error 300 (290 times: HTTP 401), timeout 2
    """
    failed = sorted(
        ((name, each) for name, each in statuses.items() if name != "ok"), key=lambda pair: -pair[1]["count"]
    )
    return ", ".join(f"{name} {each['count']:,}{_commonest(each)}" for name, each in failed)


def _commonest(status: Mapping[str, Any]) -> str:
    """Its commonest detail, and how often it occurred if that is not every time; "" where there is none."""
    if not status["detail"]:
        return ""
    often = "" if status["times"] == status["count"] else f"{status['times']:,} times: "
    return f" ({often}{clip(status['detail'], _DETAIL)})"


def scored_share(statuses: Mapping[str, Mapping[str, Any]]) -> float:
    """The share of rows with status ok; 1 without rows."""
    total = sum(each["count"] for each in statuses.values())
    return statuses.get("ok", {"count": 0})["count"] / total if total else 1.0


def contradicted_share(facts: Mapping[str, Any]) -> float | None:
    """The share of pairs with unequal rewards whose label the rewards contradict; None without such pairs."""
    if "label_contradicts_reward" not in facts:
        return None
    unequal = facts["labelled_pairs"] - facts["pairs_with_an_unscored_side"] - facts["tied_pairs"]
    return facts["label_contradicts_reward"] / unequal if unequal else None


def nothing_to_learn(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    """The reason why training would learn nothing, or the opposite of the labels; None if there is none.

    facts : of the quantiles' artifact.
    """
    return _unscored(experiment, facts) or _constant(experiment, facts) or _contradicted(experiment, facts)


def _unscored(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    least = experiment.training_data.min_scored
    for key, what in STATUSES.items():
        statuses = facts.get(key, {})
        if (share := scored_share(statuses)) < least:
            total = sum(each["count"] for each in statuses.values())
            return ObjectiveError(
                f"{statuses.get('ok', {'count': 0})['count']:,} of {total:,} {what} have a reward "
                f"({share:.1%}); the others: {unscored(statuses)}",
                where=f"reward, training_data.min_scored = {least:g}",
                remedy=_again(statuses)
                + "repair the reward, or lower the setting to train on those that have one",
            )
    return None


def _again(statuses: Mapping[str, Any]) -> str:
    """The advice to run again, where rows have a retryable status."""
    retryable = [status for status in RETRYABLE if status in statuses]
    rows = f"rows with {', '.join(retryable)} are asked for again, up to store.tries times"
    return f"run again ({rows}), " if retryable else ""


def _constant(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    ranks = experiment.objective.has_targets
    if facts["prompts_with_signal" if ranks else "pairs"]:
        return None
    ties = "all rewards are equal" if ranks else "no pair of completions has unequal rewards"
    low, high = facts["reward_range"] or (None, None)
    value = f" (every reward is {low:g})" if low is not None and low == high else ""
    return ObjectiveError(
        f"the rewards carry no signal: on each of {facts['prompts']:,} prompts {ties}{value}; "
        f"rows by status: {_counts(facts.get('statuses', {}))}",
        where=f"reward, objective.kind {experiment.objective.kind!r}",
        remedy="use a reward that tells completions apart, or draw more of them",
    )


def _contradicted(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    limit = experiment.training_data.max_contradicted
    share = contradicted_share(facts)
    if share is None or share <= limit:
        return None
    return ObjectiveError(
        f"the rewards contradict the data set's labels on {facts['label_contradicts_reward']:,} of "
        f"{facts['labelled_pairs']:,} pairs, and tie on {facts['tied_pairs']:,}: {share:.1%} of those that "
        "they tell apart",
        where=f"reward, training_data.max_contradicted = {limit:g}",
        remedy="look at the reward and at prompts.chosen_field; raise the setting to follow the rewards",
    )


def _counts(statuses: Mapping[str, Mapping[str, Any]]) -> str:
    scored = statuses.get("ok", {"count": 0})["count"]
    failed = unscored(statuses)
    return f"ok {scored:,}" + (f", {failed}" if failed else "")
