"""Judges of the study that no training sees: other packages than the one that rewards.

Needs the packages textblob, alt-profanity-check and py3langid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def polarity(batch: Sequence[Any]) -> list[float]:
    """TextBlob's polarity of each completion, -1 to 1: another lexicon of sentiment than VADER's."""
    from textblob import TextBlob

    return [TextBlob(row.completion).sentiment.polarity for row in batch]


def clean(batch: Sequence[Any]) -> list[float]:
    """1 minus the probability that alt-profanity-check gives to the completion being profane."""
    from profanity_check import predict_prob

    return [1.0 - float(profane) for profane in predict_prob([row.completion for row in batch])]


def english(batch: Sequence[Any]) -> list[float]:
    """py3langid's probability that prompt and completion are English: it falls where text breaks down."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found = []
    for row in batch:
        ranked = dict(identifier.rank(f"{row.prompt}{row.completion}"))
        found.append(float(ranked["en"]))
    return found
