"""The reward `model`: a sequence classifier that reads the conversation and gives a number."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.rewards.base import GroundTruthProblem, RewardRequest, Score, clip, guarded
from qrpo_core.rewards.model.source import locate

if TYPE_CHECKING:
    from qrpo_core.rewards.model.classifier import Classifier
    from qrpo_core.rewards.model.text import Conversations


class ModelReward:
    """The raw output (logit) of a classifier for prompt and completion in its own chat template.

    A row that is too long for the model has status `too_long` with both lengths in `detail`; nothing is cut.
    Equal token ids are scored once a call, so equal completions have equal rewards. The model is loaded and
    its golden rows are checked at the first row (see `Classifier.check`).
    """

    needs_ground_truth = False

    def __init__(self, config: ModelRewardConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._loaded: tuple[Conversations, Classifier] | None = None
        self._located = False

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return []: it uses no ground truths. Raises ConfigError or ModelError for an unusable model."""
        if not self._located:
            locate(self._config)
            self._located = True
        return []

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests.

        Raises ConfigError, ModelError or DataError for an unusable model or conversation, and EngineError if
        golden rows disagree or a single row does not fit into memory.
        """
        self.problems(())
        if not requests:
            return []
        with self._lock:
            texts, classifier = self._models()
            scores: dict[int, Score] = {}
            rows: dict[tuple[int, ...], list[int]] = {}
            for place, request in enumerate(requests):
                ids = _encode(texts, request, classifier.max_length)
                if isinstance(ids, Score):
                    scores[place] = ids
                    progress(1)
                else:
                    rows.setdefault(ids, []).append(place)
            names = {ids: _name(requests[places[0]]) for ids, places in rows.items()}
            found = classifier.scores(names, lambda ids: progress(len(rows[ids])))
            for ids, value in found.items():
                score = guarded(lambda value=value: value)  # type: ignore[misc]
                scores.update(dict.fromkeys(rows[ids], score))
        return [scores[place] for place in range(len(requests))]

    def close(self) -> None:
        """Free the model's memory. The next row loads it again."""
        with self._lock:
            if self._loaded is not None:
                self._loaded[1].close()
                self._loaded = None

    def _models(self) -> tuple[Conversations, Classifier]:
        if self._loaded is None:
            from qrpo_core.rewards.model.classifier import Classifier, load_tokenizer
            from qrpo_core.rewards.model.text import Conversations

            folder = locate(self._config).directory
            tokenizer = load_tokenizer(folder, self._config)
            # Before the weights: what the template refuses is known sooner.
            texts = Conversations(tokenizer, str(folder), day=self._config.date)
            self._loaded = texts, Classifier(folder, self._config, tokenizer)
        return self._loaded


def _encode(texts: Conversations, request: RewardRequest, limit: int) -> tuple[int, ...] | Score:
    try:
        ids = texts.encode(request)
    except (ValueError, TypeError) as error:  # also what a tokenizer says of text that is not Unicode
        return Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))
    if len(ids) > limit:
        return Score(None, "too_long", f"{len(ids)} tokens, the reward model takes {limit}")
    return ids


def _name(request: RewardRequest) -> str:
    return f"prompt {request.prompt_id}, sample {request.sample_index}"
