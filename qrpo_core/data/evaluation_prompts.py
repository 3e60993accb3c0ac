"""Training prompts and a test set of their own in one table; a prompt in both is not trained on."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.data.rows import Message
from qrpo_core.data.sources import PromptSet
from qrpo_core.data.unusable import OnUnusable, Unusable, report_unusable

#: The count of training prompts that are left out because they are evaluated on.
OVERLAP = "in_evaluation_prompts"


def with_test_set(
    train: PromptSet, test: PromptSet, on_unusable: OnUnusable, examples: tuple[int, int] = (0, 0)
) -> PromptSet:
    """The prompts of both, those of `test` held out.

    examples : how many turns stand before each prompt of `train` and of `test` (`prompts.examples`).

    A training prompt is in both if a conversation of `test` has its turns, whatever the white space, the
    system turn and these turns. With "refuse" they are an UnusableError that names the rows of both sources.
    With "skip" they
    are left out of training, counted as OVERLAP.
    """
    tested = {_turns(messages, examples[1]): source for _, messages, source in _rows(test.prompts)}
    found = [
        Unusable(
            prompt, source, f"the prompt is also {tested[turns]} of evaluation.prompts", "remove one", _KIND
        )
        for prompt, messages, source in _rows(train.prompts)
        if (turns := _turns(messages, examples[0])) in tested
    ]
    both = pa.array(sorted(report_unusable(found, on_unusable)), pa.string())
    kept = train.prompts.filter(pc.invert(pc.is_in(train.prompts["prompt_id"], value_set=both)))
    offline = train.offline.filter(pc.invert(pc.is_in(train.offline["prompt_id"], value_set=both)))
    counts = Counter(train.counts)
    counts.update(test.counts)
    for name in ("prompts", "train"):
        counts[name] -= len(found)
    named = {OVERLAP: len(found)} if found else {}
    if not len(kept):
        raise DataError(
            "every training prompt is a prompt of evaluation.prompts, too",
            where=found[0].where,
            remedy="name another test set",
        )
    overlap = tuple(each.where for each in found)
    return PromptSet(pa.concat_tables([kept, test.prompts]), offline, dict(counts) | named, overlap)


_KIND = "that are evaluated on, too"


def _rows(prompts: pa.Table) -> zip[tuple[str, list[Message], str]]:
    names = ("prompt_id", "messages", "source")
    return zip(*(prompts[name].to_pylist() for name in names), strict=True)


def _turns(messages: list[Message], before: int) -> str:
    """A digest of the turns behind the system turn and `before` others, with white space folded."""
    turns = [turn for turn in messages if turn["role"] != "system"][before:]
    return hashing.prompt_id([turn | {"content": " ".join(turn["content"].split())} for turn in turns])
