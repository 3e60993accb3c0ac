"""The headlines of a finished run, from the facts of its artifacts.

To add one, write a function from `Finished` to headlines and put it into `_SOURCES`. It reads what manifests
hold (`facts`) and the evaluation, computes nothing, and gives nothing where there is nothing to say. The
report shows them, so what it reads must be an input of the report's recipe: prompts, the rounds' artifacts,
the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qrpo_core.evaluation.headlines import Headline, in_order
from qrpo_core.evaluation.metrics import EvaluationResult
from qrpo_core.steps.rounds import Made
from qrpo_core.store.artifacts import Manifest
from qrpo_core.train.names import OBJECTIVE_NAMES


@dataclass(frozen=True)
class Finished:
    """What a finished run made, without its report. rounds : of each round, in order."""

    prompts: Manifest
    rounds: Sequence[Made]
    evaluation: EvaluationResult


def headlines(finished: Finished) -> list[Headline]:
    """Everything that stands under the first line of the result, warnings first."""
    return in_order(line for source in _SOURCES for line in source(finished))


def trained_on(finished: Finished) -> Iterator[Headline]:
    """Which objective was trained, and on how many completions or pairs."""
    for number, made in enumerate(finished.rounds, 1):
        where = "" if len(finished.rounds) == 1 else f" in round {number}"
        facts = made.train.facts
        name = OBJECTIVE_NAMES[facts["diagnostics"]["objective"]]
        yield Headline("note", f"{name.short} was trained on {facts['rows']:,} {name.items}{where}.")


_SOURCES: tuple[Callable[[Finished], Iterable[Headline]], ...] = (trained_on,)
