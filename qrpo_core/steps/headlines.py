"""The headlines of a finished run, from the facts of its artifacts.

To add one, write a function from `Finished` to headlines and put it into `_SOURCES`. It reads what manifests
hold (`facts`) and the evaluation, computes nothing, and gives nothing where there is nothing to say. The
report shows them, so what it reads must be an input of the report's recipe (prompts, the rounds' artifacts,
the evaluation), or follow from such inputs, as doubts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo_core.config import Experiment
from qrpo_core.evaluation.headlines import Headline, Severity, in_order
from qrpo_core.evaluation.metrics import EvaluationResult
from qrpo_core.evaluation.saved import drawn_caution
from qrpo_core.evaluation.summary import FEW_FAILED, percent
from qrpo_core.steps import signal
from qrpo_core.steps.rounds import Made
from qrpo_core.steps.truncated import many_cut
from qrpo_core.steps.trusted import said
from qrpo_core.store.artifacts import Manifest
from qrpo_core.train.names import OBJECTIVE_NAMES

#: A larger share of contradicted labels is a warning: people contradict each other about as often.
MUCH_CONTRADICTED = 0.3

_DECIDED = {"label": "the data set's labels", "reward": "their rewards"}


@dataclass(frozen=True)
class Finished:
    """What a finished run made, without its report. rounds : of each round, in order.

    doubts : why a scorer is not to be trusted (`steps.trusted`).
    drawn : how much of the training is in what rewards after were drawn from (`steps.drawn`); None where that
        is no copy of the policy.
    """

    experiment: Experiment
    prompts: Manifest
    rounds: Sequence[Made]
    evaluation: EvaluationResult
    drawn: Mapping[str, Any] | None = None
    doubts: Sequence[Mapping[str, Any]] = ()


def headlines(finished: Finished) -> list[Headline]:
    """Everything that stands under the first line of the result, warnings first."""
    return in_order(line for source in _SOURCES for line in source(finished))


def trained_on(finished: Finished) -> Iterator[Headline]:
    """Which objective was trained, on how many completions or pairs, and what preferred one to the other."""
    for where, made in _rounds(finished):
        facts = made.train.facts
        name = OBJECTIVE_NAMES[facts["diagnostics"]["objective"]]
        text = f"{name.short} was trained on {facts['rows']:,} {name.items}{where}"
        if "labelled_pairs" in made.quantiles.facts and name.short != "QRPO":
            text += f", preferred by {_DECIDED[made.quantiles.facts['preference']]}"
        yield Headline("note", f"{text}.")


def unmoved(finished: Finished) -> Iterator[Headline]:
    """Where training left the policy as it was."""
    for where, made in _rounds(finished):
        if made.train.facts["saved"]["share"] is None:
            text = (
                f"Training left the policy as it was{where}: raise training.learning_rate or training.epochs."
            )
            yield Headline("warning", text)


def contradicted_labels(finished: Finished) -> Iterator[Headline]:
    """How far the rewards that decided contradict the labels that the data set has."""
    for where, made in _rounds(finished):
        facts = made.quantiles.facts
        if (share := signal.contradicted_share(facts)) is None:
            continue
        pairs, ties = facts["labelled_pairs"] - facts["pairs_with_an_unscored_side"], facts["tied_pairs"]
        text = (
            f"The rewards contradict the data set's labels on {facts['label_contradicts_reward']:,} of "
            f"{pairs:,} pairs{where} ({percent(share)} of those that they tell apart; {ties:,} tie)."
        )
        yield Headline("warning" if share > MUCH_CONTRADICTED else "note", text)


def unscored_rows(finished: Finished) -> Iterator[Headline]:
    """Completions and references without a reward, by status, where they are more than a few."""
    for where, made in _rounds(finished):
        for what, key in (("training completions", "statuses"), ("references", "reference_statuses")):
            statuses = made.quantiles.facts.get(key, {})
            if 1 - signal.scored_share(statuses) > FEW_FAILED:
                total = sum(each["count"] for each in statuses.values())
                failed = total - statuses.get("ok", {"count": 0})["count"]
                text = f"{failed:,} of {total:,} {what}{where} have no reward: {signal.unscored(statuses)}."
                yield Headline("warning", text)


def graded_without_an_answer(finished: Finished) -> Iterator[Headline]:
    """Completions that count as wrong because thinking did not end, or a library's scorer raised on them."""
    said = {
        "unfinished_thinking": "end while still thinking: an empty answer was graded. Raise "
        "sampling.max_new_tokens",
        "scorer_raised": "made the scorer raise and count as wrong",
    }
    for where, made in _rounds(finished):
        total = sum(each["count"] for each in made.quantiles.facts.get("statuses", {}).values())
        for name, count in made.quantiles.facts.get("remarked", {}).items():
            if count:
                severity: Severity = "warning" if count > total / 2 else "note"
                yield Headline(severity, f"{count:,} of {total:,} training completions{where} {said[name]}.")


def doubted_scorers(finished: Finished) -> Iterator[Headline]:
    """Scorers that pay for anything, or not for the right answer, which the experiment goes on with."""
    for doubt in finished.doubts:
        yield Headline("warning" if doubt["severe"] else "note", f"{said(doubt)}; {doubt['remedy']}.")


def tied_prompts(finished: Finished) -> Iterator[Headline]:
    """How many prompts taught nothing, where they are most of them."""
    for where, made in _rounds(finished):
        facts = made.quantiles.facts
        tied = facts["prompts"] - facts["prompts_with_signal"]
        if facts["reward_range"] is not None and 2 * tied > facts["prompts"]:
            text = f"On {tied:,} of {facts['prompts']:,} training prompts{where} all rewards are equal: they "
            yield Headline("warning", f"{text}teach nothing.")


def cut(finished: Finished) -> Iterator[Headline]:
    """Where the length limit cut many completions: rewards are then those of beginnings."""
    for where, made in _rounds(finished):
        for name, found in made.quantiles.facts["cut"].items():
            if (line := many_cut(finished.experiment, f"{name}{where}", found)) is not None:
                yield Headline("warning", line)
    if finished.evaluation.after.truncation_rate == 1:
        text = "Every held-out completion of the trained policy was cut by the length limit: raise "
        yield Headline("warning", f"{text}sampling.max_new_tokens.")


def drawn_from_another(finished: Finished) -> Iterator[Headline]:
    """Where too little of the training is in what the rewards after training were drawn from."""
    if caution := drawn_caution(finished.drawn):
        yield Headline("warning", caution)


def _rounds(finished: Finished) -> Iterator[tuple[str, Made]]:
    """Each round, and how to name it where there are several."""
    for number, made in enumerate(finished.rounds, 1):
        yield "" if len(finished.rounds) == 1 else f" in round {number}", made


_SOURCES: tuple[Callable[[Finished], Iterable[Headline]], ...] = (
    trained_on,
    unmoved,
    contradicted_labels,
    unscored_rows,
    graded_without_an_answer,
    doubted_scorers,
    tied_prompts,
    cut,
    drawn_from_another,
)
