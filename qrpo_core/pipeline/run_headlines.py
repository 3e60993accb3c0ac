"""The headlines of a finished run, from the facts of its artifacts.

To add a headline, write a function from `Finished` to headlines and put it into `_SOURCES`. It reads the
facts of manifests and the evaluation, and computes nothing. The report shows the headlines, so a headline may
read only inputs of the report's recipe (prompts, the rounds' artifacts, the evaluation) or values that follow
from them, such as reward problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo_core.common.formatting import number, percent
from qrpo_core.config import Experiment
from qrpo_core.config.training import HIDDEN_MOVEMENTS
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.objective_kinds import KINDS
from qrpo_core.pipeline import learning_signal
from qrpo_core.pipeline.reward_trust import in_words
from qrpo_core.pipeline.rounds import RoundArtifacts
from qrpo_core.pipeline.truncated import many_cut
from qrpo_core.reporting.headlines import Headline, Severity, sort_headlines
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES
from qrpo_core.reporting.summary import FEW_FAILED, change_text, engine_copy_warning
from qrpo_core.rewards.registry import sees
from qrpo_core.store.manifest import Manifest

#: A larger share of contradicted labels is a warning: people contradict each other about as often.
MUCH_CONTRADICTED = 0.3

#: A larger ratio of the mean lengths after and before training, or of before and after, is a note.
MUCH_LONGER = 1.5

_DECIDED = {"label": "the data set's labels", "reward": "their rewards"}


@dataclass(frozen=True)
class Finished:
    """The artifacts of a finished run, without its report. rounds : in order.

    reward_problems : reasons not to trust a scorer (`pipeline.reward_trust`).
    drawn : how much of the training the engine's copy of the policy has (`pipeline.engine_copy`); None
        where the engine draws from no copy.
    """

    experiment: Experiment
    prompts: Manifest
    rounds: Sequence[RoundArtifacts]
    evaluation: EvaluationResult
    drawn: Mapping[str, Any] | None = None
    reward_problems: Sequence[Mapping[str, Any]] = ()


def headlines(finished: Finished) -> list[Headline]:
    """The headlines of the result, warnings first."""
    return sort_headlines(line for source in _SOURCES for line in source(finished))


def trained_on(finished: Finished) -> Iterator[Headline]:
    """The objective, the number of completions or pairs, and how the preferred side was chosen."""
    for where, made in _rounds(finished):
        facts = made.train.facts
        kind = facts["diagnostics"]["objective"]
        name = OBJECTIVE_NAMES[kind]
        text = f"{name.short} was trained on {facts['rows']:,} {name.items}{where}"
        if "labelled_pairs" in made.quantiles.facts and not KINDS[kind].has_target:
            text += f", preferred by {_DECIDED[made.quantiles.facts['preference']]}"
        yield Headline("note", f"{text}.")


def judged(finished: Finished) -> Iterator[Headline]:
    """Each held-out judge's difference; a warning where it fell, which a rising reward may hide."""
    level = f"{100 * finished.evaluation.confidence:g} %"
    experiment = finished.experiment
    seen = {name for name, judge in experiment.evaluation.judges.items() if sees(experiment.reward, judge)}
    for name, judge in finished.evaluation.judges.items():
        low, high = judge.difference.low, judge.difference.high
        fell = high is not None and high < 0
        text = (
            f"Judge {name}, {'a part of the reward' if name in seen else 'which training never saw'}: "
            f"{change_text(judge.difference)} on {judge.prompts:,} held-out prompts ({level} interval)"
        )
        shown = "" if low is None or high is None or low > 0 or fell else ": no change is shown"
        yield Headline("warning" if fell else "note", f"{text}{shown}.")
    for name, statuses in finished.evaluation.silent_judges.items():
        counted = ", ".join(f"{status} {count:,}" for status, count in statuses.items() if count)
        text = f"Judge {name} has no score on both sides of any held-out prompt"
        yield Headline("warning", f"{text} (after training: {counted or 'all scored'}).")


def unmoved(finished: Finished) -> Iterator[Headline]:
    """A warning where training changed no weight."""
    for where, made in _rounds(finished):
        if made.train.facts["saved"]["share"] is None:
            text = (
                f"Training left the policy as it was{where}: raise training.learning_rate or training.epochs."
            )
            yield Headline("warning", text)


def hidden_movements(finished: Finished) -> Iterator[Headline]:
    """A warning where the loss did not see small movements of the weights."""
    training = finished.experiment.training
    if training.hides_movements:
        whole = training.parallel == "ddp" and training.deepspeed is None
        remedy = "training.weights_dtype auto" if whole else "training.precision fp32"
        yield Headline("warning", f"{HIDDEN_MOVEMENTS}. Set {remedy}.")


def contradicted_labels(finished: Finished) -> Iterator[Headline]:
    """The share of pairs on which the rewards contradict the data set's labels."""
    for where, made in _rounds(finished):
        facts = made.quantiles.facts
        if (share := learning_signal.contradicted_share(facts)) is None:
            continue
        pairs, ties = facts["labelled_pairs"] - facts["pairs_with_an_unscored_side"], facts["tied_pairs"]
        text = (
            f"The rewards contradict the data set's labels on {facts['label_contradicts_reward']:,} of "
            f"{pairs:,} pairs{where} ({percent(share)} of those that they tell apart; {ties:,} tie)."
        )
        yield Headline("warning" if share > MUCH_CONTRADICTED else "note", text)


def unscored_rows(finished: Finished) -> Iterator[Headline]:
    """Completions and references without a reward, by status, above a small share."""
    for where, made in _rounds(finished):
        for key, what in learning_signal.STATUSES.items():
            statuses = made.quantiles.facts.get(key, {})
            if 1 - learning_signal.scored_share(statuses) > FEW_FAILED:
                total = sum(each["count"] for each in statuses.values())
                failed = total - statuses.get("ok", {"count": 0})["count"]
                why = learning_signal.unscored(statuses)
                text = f"{failed:,} of {total:,} {what}{where} have no reward: {why}."
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


def untrusted_scorers(finished: Finished) -> Iterator[Headline]:
    """Scorers that reward wrong answers or none of the right ones, where the experiment only warns."""
    for doubt in finished.reward_problems:
        yield Headline("warning" if doubt["severe"] else "note", f"{in_words(doubt)}; {doubt['remedy']}.")


def tied_prompts(finished: Finished) -> Iterator[Headline]:
    """The number of prompts with equal rewards, where they are the majority."""
    for where, made in _rounds(finished):
        facts = made.quantiles.facts
        tied = facts["prompts"] - facts["prompts_with_signal"]
        if facts["reward_range"] is not None and 2 * tied > facts["prompts"]:
            text = f"On {tied:,} of {facts['prompts']:,} training prompts{where} all rewards are equal: they "
            yield Headline("warning", f"{text}teach nothing.")


def cut(finished: Finished) -> Iterator[Headline]:
    """A warning where the length limit cut many completions: their rewards judge beginnings."""
    for where, made in _rounds(finished):
        for name, found in made.quantiles.facts["cut"].items():
            if (line := many_cut(finished.experiment, f"{name}{where}", found)) is not None:
                yield Headline("warning", line)
    before, after = finished.evaluation.before.truncation_rate, finished.evaluation.after.truncation_rate
    if after > finished.experiment.training_data.truncated_warning or after == 1:
        text = (
            f"The length limit cuts {percent(after)} of the trained policy's held-out completions "
            f"({percent(before)} of the reference's): their rewards judge beginnings. {_remedy(finished)}."
        )
        yield Headline("warning", text)


def _remedy(finished: Finished) -> str:
    """What ends the completions of the trained policy: another training only if training made it worse."""
    if finished.evaluation.after.truncation_rate <= finished.evaluation.before.truncation_rate:
        return "Raise sampling.max_new_tokens"
    if finished.experiment.training_data.truncated != "wrong":
        return "Set training_data.truncated 'wrong', or raise sampling.max_new_tokens"
    return "Lower training.learning_rate, or raise objective.beta or sampling.max_new_tokens"


def length(finished: Finished) -> Iterator[Headline]:
    """A note where completions became much longer or shorter: a reward may follow the length."""
    before, after = finished.evaluation.before.mean_length, finished.evaluation.after.mean_length
    if max(before, after) > MUCH_LONGER * min(before, after):
        text = (
            f"Held-out completions have {number(after, 1)} tokens on average, {number(before, 1)} before: "
            "part of the change in reward may come from their length."
        )
        yield Headline("note", text)


def drawn_from_another(finished: Finished) -> Iterator[Headline]:
    """A warning where the engine drew from a copy that lost much of the training."""
    if caution := engine_copy_warning(finished.drawn):
        yield Headline("warning", caution)


def _rounds(finished: Finished) -> Iterator[tuple[str, RoundArtifacts]]:
    """Each round with its name for a sentence; "" where there is one round."""
    for order, made in enumerate(finished.rounds, 1):
        yield "" if len(finished.rounds) == 1 else f" in round {order}", made


_SOURCES: tuple[Callable[[Finished], Iterable[Headline]], ...] = (
    judged,
    trained_on,
    unmoved,
    hidden_movements,
    contradicted_labels,
    unscored_rows,
    graded_without_an_answer,
    untrusted_scorers,
    tied_prompts,
    cut,
    length,
    drawn_from_another,
)
