"""The example completions of the report, chosen by rank of change and not by hand."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.inputs import EvaluationInput
from qrpo_core.evaluation.metrics import prompt_means

EXAMPLE_RULE = (
    "Prompts are ranked by the change of their mean reward; shown are the largest gain, the upper quartile, "
    "the median, the lower quartile and the largest loss (or smallest gain). Of each prompt, the first "
    "sample index that has a reward on both sides."
)

_RANKS = (
    (1.0, "largest gain"),
    (0.75, "upper quartile"),
    (0.5, "median"),
    (0.25, "lower quartile"),
    (0.0, "largest loss"),
)


def pick_examples(before: pa.Table, after: pa.Table, prompts: pa.Table) -> list[dict[str, Any]]:
    """At most five examples by the rule `EXAMPLE_RULE`, fewer if ranks coincide.

    before, after : as for `EvaluationInput`. prompts : prompt_id and messages of at least these prompts.

    Returns dicts with label, prompt_id, sample_index, prompt, before, after, reward_before, reward_after,
    mean_before, mean_after. Ties of rank are broken by prompt_id. A prompt whose ok completions share
    no sample index is left out of the ranking.

    Raises DataError for a prompt without messages.
    """
    # The sampling settings do not matter here: nothing is said about the KL.
    data = EvaluationInput(before, after, temperature=1.0, top_p=1.0)
    means = prompt_means(data)
    sides = [_ok_rows(table) for table in (data.before, data.after)]
    ranked = []
    for place, prompt in enumerate(means.prompt_ids):
        common = sorted(sides[0][prompt].keys() & sides[1][prompt].keys())
        if common:
            ranked.append((float(means.difference[place]), prompt, place, common[0]))
    ranked.sort()
    chosen: dict[int, list[str]] = {}
    for quantile, label in _RANKS if ranked else ():
        chosen.setdefault(round(quantile * (len(ranked) - 1)), []).append(label)
    messages = dict(zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True))
    found = []
    for rank, labels in chosen.items():
        change, prompt, place, index = ranked[rank]
        if prompt not in messages:
            raise DataError(f"no messages for prompt {prompt}", where="report", remedy="pass all prompts")
        rows = [side[prompt][index] for side in sides]
        found.append(
            {
                "label": _label(labels, change, len(ranked)),
                "prompt_id": prompt,
                "sample_index": index,
                "prompt": _conversation(messages[prompt]),
                "before": rows[0]["text"],
                "after": rows[1]["text"],
                "reward_before": rows[0]["reward"],
                "reward_after": rows[1]["reward"],
                "mean_before": float(means.before[place]),
                "mean_after": float(means.after[place]),
            }
        )
    return found


def _ok_rows(table: pa.Table) -> dict[str, dict[int, dict[str, Any]]]:
    """The ok rows by prompt and sample index."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["status"] == "ok":
            found.setdefault(row["prompt_id"], {})[row["sample_index"]] = row
    return found


def _label(labels: list[str], change: float, prompts: int) -> str:
    if prompts == 1:
        return "the only prompt"
    # The top of the ranking need not be a gain, nor its end a loss.
    names = {"largest gain": change > 0 or "smallest loss", "largest loss": change < 0 or "smallest gain"}
    if change == 0:
        names = dict.fromkeys(names, "no change")
    words = [label if names.get(label, True) is True else str(names[label]) for label in labels]
    return ", ".join(dict.fromkeys(words))


def _conversation(messages: list[dict[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
