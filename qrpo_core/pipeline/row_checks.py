"""The checks of single rows: ground truths, chat template and lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import DataError, QRPOError
from qrpo_core.common.progress import Progress
from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.data.unusable import Unusable
from qrpo_core.engines.kinds import kind_of
from qrpo_core.models.chat import Chat
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.rewards.registry import check_ground_truths

TOO_LONG = "too long for the model"
NO_GROUND_TRUTH = "without a ground truth"
BAD_GROUND_TRUTH = "with a ground truth that the reward refuses"
REFUSED = "that the chat template refuses"


def bad_ground_truths(experiment: Experiment, prompts: pa.Table) -> Iterator[Unusable]:
    """The ground truths that the reward refuses, and those of held-out prompts that a judge refuses."""
    check_rewards(experiment)
    yield from _refused_by("", experiment.reward, experiment, prompts)
    held_out = prompts.filter(pc.equal(prompts["split"], "held_out"))
    for name, judge in experiment.evaluation.judges.items():
        yield from _refused_by(f"evaluation.judges.{name}: ", judge, experiment, held_out)


def check_rewards(experiment: Experiment) -> None:
    """Raise the errors of rewards that need no row: a missing library, model, sandbox or function."""
    for reward in (experiment.reward, *experiment.evaluation.judges.values()):
        check_ground_truths(reward, [])


def _refused_by(
    who: str, reward: RewardConfig, experiment: Experiment, prompts: pa.Table
) -> Iterator[Unusable]:
    columns = (prompts[name].to_pylist() for name in ("prompt_id", "source", "ground_truth"))
    rows = list(zip(*columns, strict=True))
    problems = check_ground_truths(reward, [(prompt, ground_truth) for prompt, _, ground_truth in rows])
    if problems and all(ground_truth is None for *_, ground_truth in rows):
        raise DataError(f"{who}{problems[0].problem}", where=rows[0][1], remedy=problems[0].remedy)
    for found in problems:
        prompt, source, ground_truth = rows[found.row]
        sections = (experiment.prompts, experiment.evaluation.prompts)
        name = next((each.ground_truth_field for each in sections if each and each.ground_truth_field), None)
        if ground_truth is None and name is not None:
            yield Unusable(
                prompt, source, f"{who}{name!r} is null", "fill it in or remove the row", NO_GROUND_TRUTH
            )
        else:
            kind = NO_GROUND_TRUTH if ground_truth is None else BAD_GROUND_TRUTH
            yield Unusable(prompt, source, f"{who}{found.problem}", found.remedy, kind)


def sampled_splits(experiment: Experiment) -> list[str]:
    """The splits whose prompts get sampled completions."""
    data = experiment.training_data
    own = data.mode == "offline" and (data.references == "offline" or not experiment.objective.has_targets)
    return ["held_out"] if own else ["held_out", "train"]


def bad_conversations(
    experiment: Experiment, tables: PromptTables, chat: Chat, progress: Progress
) -> Iterator[Unusable]:
    """Conversations that the chat template refuses, and prompts and completions that are too long.

    Raises ModelError for a template that renders no conversation.
    """
    chat.check()
    offline = _offline_of(tables)
    sampled, new = sampled_splits(experiment), experiment.sampling.max_new_tokens
    longest = kind_of(experiment).longest(experiment, chat.max_length)
    columns = (tables.prompts[name].to_pylist() for name in ("prompt_id", "source", "messages", "split"))
    for prompt, source, messages, split in zip(*columns, strict=True):
        progress(1)
        try:
            length = len(chat.prompt_token_ids(messages))
        except QRPOError as error:
            yield _refusal(prompt, source, error)
            continue
        if split in sampled and length + new > longest:
            what = f"a prompt of {length:,} tokens and sampling.max_new_tokens {new:,} exceed {longest:,}"
            yield Unusable(prompt, source, what, "shorten it, or lower sampling.max_new_tokens", TOO_LONG)
            continue
        for index, text, place in offline.get(prompt, ()) if split == "train" else ():
            try:
                answer = len(chat.encode_completion(text, messages))
            except QRPOError as error:
                yield _refusal(prompt, place, error, index)
                continue
            if length + answer > chat.max_length:
                what = f"prompt and completion of {length + answer:,} tokens exceed {chat.max_length:,}"
                yield Unusable(prompt, place, what, "shorten or remove it", TOO_LONG, index)


def _refusal(prompt: str, where: str, error: QRPOError, index: int | None = None) -> Unusable:
    return Unusable(prompt, where, error.message, error.remedy or "change it", REFUSED, index)


def _offline_of(tables: PromptTables) -> dict[str, list[tuple[int, str, str]]]:
    """(sample_index, text, place) of every different completion, by prompt."""
    found: dict[str, dict[int, tuple[int, str, str]]] = {}
    if tables.offline is not None:
        names = ("prompt_id", "sample_index", "text", "source", "label")
        columns = (tables.offline[name].to_pylist() for name in names)
        for prompt, index, text, source, label in zip(*columns, strict=True):
            place = f"{source}, {label}" if label else source
            found.setdefault(prompt, {}).setdefault(index, (index, text, place))
    return {prompt: list(rows.values()) for prompt, rows in found.items()}
