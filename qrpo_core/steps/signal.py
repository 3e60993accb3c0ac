"""Whether rewards say anything that a policy could learn: looked at before a model is trained.

Asked of the facts that the quantiles' artifact holds, so that a changed limit is looked at without computing
anything again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import Experiment
from qrpo_core.errors import ObjectiveError
from qrpo_core.records import RETRYABLE
from qrpo_core.rewards.base import SCORER_RAISED, clip
from qrpo_core.rewards.thinking import UNFINISHED

#: Longest detail that an error quotes of a status.
_DETAIL = 200


def status_facts(rewards: pa.Table) -> dict[str, dict[str, Any]]:
    """How many REWARDS rows have each status; of those not ok the commonest detail, and how often it came."""
    found: dict[str, dict[str, Any]] = {}
    for row in rewards["status"].value_counts().to_pylist():
        details = rewards.filter(pc.equal(rewards["status"], row["values"]))["detail"]
        (detail, times), *_ = Counter(details.to_pylist()).most_common(1)
        found[row["values"]] = {"count": row["counts"], "detail": detail, "times": times}
    return found


def remarked(rewards: pa.Table) -> dict[str, int]:
    """How many REWARDS rows are wrong for want of an answer: endless thinking, a scorer that raised."""
    details = rewards.filter(pc.equal(rewards["status"], "ok"))["detail"]
    return {
        "unfinished_thinking": pc.sum(pc.equal(details, UNFINISHED)).as_py() or 0,
        "scorer_raised": pc.sum(pc.starts_with(details, SCORER_RAISED)).as_py() or 0,
    }


def unscored(statuses: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the rows without a reward, the commonest status first, each with its commonest detail.

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
    """The share of rows with status ok; 1 where nothing was to be scored."""
    total = sum(each["count"] for each in statuses.values())
    return statuses.get("ok", {"count": 0})["count"] / total if total else 1.0


def contradicted_share(facts: Mapping[str, Any]) -> float | None:
    """The share of labels that rewards contradict, of the pairs that they tell apart; None without any."""
    if "label_contradicts_reward" not in facts:
        return None
    told = facts["labelled_pairs"] - facts["pairs_with_an_unscored_side"] - facts["tied_pairs"]
    return facts["label_contradicts_reward"] / told if told else None


def nothing_to_learn(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    """Why training would learn nothing, or the opposite of the data set's labels; None where it would not.

    facts : of the quantiles' artifact.
    """
    return _unscored(experiment, facts) or _constant(experiment, facts) or _contradicted(experiment, facts)


def _unscored(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    least = experiment.training_data.min_scored
    for what, key in (("training completions", "statuses"), ("references", "reference_statuses")):
        statuses = facts.get(key, {})
        if (share := scored_share(statuses)) < least:
            total = sum(each["count"] for each in statuses.values())
            return ObjectiveError(
                f"{statuses.get('ok', {'count': 0})['count']:,} of {total:,} {what} have a reward "
                f"({share:.1%}); the others: {unscored(statuses)}",
                where=f"reward, training_data.min_scored = {least:g}",
                remedy=_again(statuses)
                + "mend the reward, or lower the setting to train on those that have one",
            )
    return None


def _again(statuses: Mapping[str, Any]) -> str:
    """That the next run asks for rows again, where their status can pass."""
    passing = [status for status in RETRYABLE if status in statuses]
    rows = f"rows with {', '.join(passing)} are asked for again, up to store.tries times"
    return f"run again ({rows}), " if passing else ""


def _constant(experiment: Experiment, facts: Mapping[str, Any]) -> ObjectiveError | None:
    ranks = experiment.objective.kind == "qrpo"
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
