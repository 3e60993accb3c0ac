"""How much of a training is in the saved policy, and in what rewards were drawn from: in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qrpo_core.evaluation.summary import percent

#: Below this share a saved policy is refused. Stochastic rounding keeps it within a few hundredths of 1;
#: nearest rounding, at the learning rates of this field, and merges into the wrong weights stay far away.
LOWEST_SHARE = 0.9


def saved_in_words(facts: Mapping[str, Any]) -> str:
    """How much of a training is in what was written. facts : as in `train.survival.Survival`."""
    rows = f"on {facts['rows']:,} training rows in float32 arithmetic"
    if facts["share"] is None:
        return (
            "training changed no log-prob by more than rounding does, so no share of it can be stated (from "
            f"what was trained to this: largest difference {facts['largest_difference']:.2g} nats, {rows})"
        )
    return (
        f"{percent(facts['share'])} of the training survived (mean |log-ratio| {facts['written']:.4g} of "
        f"{facts['trained']:.4g} nats, largest difference {facts['largest_difference']:.2g}, {rows})"
    )


def survival_rows(
    saved: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None = None
) -> list[tuple[str, str]]:
    """(label, value) rows, the same for the terminal, the UI and the report.

    saved : facts of each round's saved policy. drawn : facts of what the rewards after training were drawn
    from (`steps.drawn`); None where that is no copy of the policy.
    """
    rows = []
    for number, facts in enumerate(saved, 1):
        where = f", round {number}" if len(saved) > 1 else ""
        rows.append((f"Saved policy{where}, {facts['dtype']}", saved_in_words(facts)))
    if drawn is not None:
        rows.append((f"Rewards after are drawn from a {drawn['dtype']} copy", saved_in_words(drawn)))
    return rows


def survival_tile(
    saved: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None
) -> list[tuple[str, str, str, str]]:
    """The report's tile: label, value, note, verdict; none where nothing was measured."""
    if not saved:
        return []
    shares = [facts["share"] for facts in saved if facts["share"] is not None]
    value = percent(min(shares)) if shares else "unmoved"
    note = f"in the saved policy ({saved[-1]['dtype']})"
    if drawn is not None and drawn["share"] is not None:
        note += f"; {percent(drawn['share'])} in the {drawn['dtype']} copy that rewards were drawn from"
    return [("Training that survived", value, note, "bad" if drawn_caution(drawn) else "")]


def drawn_caution(drawn: Mapping[str, Any] | None) -> str:
    """A sentence where too little of the training is in what the rewards were drawn from; else empty."""
    if drawn is None or drawn["share"] is None or abs(drawn["share"] - 1) <= 1 - LOWEST_SHARE:
        return ""
    return (
        f"Rewards after are those of a {drawn['dtype']} copy that has {percent(drawn['share'])} of the "
        "training, not those of the saved policy: set model.dtype: float32."
    )
