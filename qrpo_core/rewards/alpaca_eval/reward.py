"""The reward `alpaca_eval`: how probably AlpacaEval's judge prefers a completion to the baseline's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from qrpo_core.common.errors import EngineError
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.judge_rewards import AlpacaEvalRewardConfig
from qrpo_core.rewards.alpaca_eval import package
from qrpo_core.rewards.base import GroundTruthProblem, RewardRequest, Score, clip, refuse
from qrpo_core.rewards.judge.endpoint import EndpointReward, first_choice

_PROBE = [{"role": "user", "content": "Reply with m alone."}]


class AlpacaEvalReward(EndpointReward):
    """The judge's preference for the completion over the baseline's output, in [0, 1]; equal texts 0.5.

    The ground truth is the baseline's output. The package alpaca-eval writes the question (it switches the
    two outputs by the instruction) and reads the answer; this project sends it. Other statuses:

    parse_error : the answer states no preference.
    too_long, endpoint_error, refused : see `judge.endpoint`.
    """

    _needs_ground_truth = True
    _wrong_settings = "see reward.alpaca_eval: url, model, annotator"

    def __init__(self, config: AlpacaEvalRewardConfig) -> None:
        super().__init__(config, "reward.alpaca_eval", config.model or f"of {config.annotator}")
        self._config = config
        self._package = package.Package(config.python)
        self._questions: dict[tuple[str, int], Any] = {}
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return ground truths that are no output of a baseline.

        Raises ConfigError if the package is missing or has no such annotator.
        """
        package.described(self._config.python, self._config.annotator)
        return super().problems(ground_truths)

    def check_ground_truth(self, ground_truth: str) -> None:
        """Raise ValueError for a ground truth that is neither a text nor an object with `output`."""
        baseline_output(ground_truth)

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests. Raises EngineError as `judge` does."""
        refuse(self, ((request.prompt_id, request.ground_truth) for request in requests))
        if not requests:
            return []
        config, rows = self._config, [_row(request) for request in requests]
        questions = self._package.ask("ask", annotator=config.annotator, rows=rows)
        keys = [(request.prompt_id, request.sample_index) for request in requests]
        self._questions, self._answers = dict(zip(keys, questions, strict=True)), {}
        asked = [each for each, question in zip(requests, questions, strict=True) if question is not None]
        scores = iter(super().score(asked, progress))
        progress(len(requests) - len(asked))
        found = [Score(0.5) if question is None else next(scores) for question in questions]
        answers = [self._answers.get(key) for key in keys]
        read = self._package.ask("read", annotator=config.annotator, rows=rows, answers=answers)
        return [
            _preference(answer, value) if score.status == "ok" and answer is not None else score
            for score, answer, value in zip(found, answers, read, strict=True)
        ]

    def close(self) -> None:
        """End the package's process."""
        self._package.close()

    def _body(self, request: RewardRequest) -> dict[str, Any]:
        return self._request(self._questions[request.prompt_id, request.sample_index])

    def _probe(self) -> dict[str, Any]:
        return self._request(_PROBE)

    def _request(self, messages: Any) -> dict[str, Any]:
        own = package.described(self._config.python, self._config.annotator)
        return {
            "top_p": 1.0,
            **own["fields"],
            "model": self._config.model or own["model"],
            "messages": messages,
        }

    def _check(self, reply: dict[str, Any]) -> None:
        """Raise EngineError without log-probabilities where the annotator reads them."""
        fields = package.described(self._config.python, self._config.annotator)["fields"]
        choice = first_choice(reply)
        if fields.get("logprobs") and choice and not (choice.get("logprobs") or {}).get("content"):
            raise EngineError(
                f"the judge gives no log-probabilities, and {self._config.annotator} reads them",
                where=self._where,
                remedy="serve a judge that gives them, or choose another reward.alpaca_eval.annotator",
            )

    def _read(self, request: RewardRequest, reply: dict[str, Any]) -> float | Score:
        choice = first_choice(reply)
        if choice is None:
            return Score(None, "parse_error", f"a reply of another form: {clip(json.dumps(reply), 200)}")
        self._answers[request.prompt_id, request.sample_index] = choice
        return 0.0  # the package reads all answers at once, in `score`


def baseline_output(ground_truth: str) -> str:
    """Return the baseline's output: the ground truth itself, or its `output`. ValueError without one."""
    value = json.loads(ground_truth)
    output = value.get("output") if isinstance(value, dict) else value
    if not isinstance(output, str):
        raise ValueError("the baseline's output has to be a text, or an object whose `output` is one")
    return output


def _row(request: RewardRequest) -> dict[str, str]:
    """The row as the package has it: output_1 is the baseline's, so that a preference of 2 is for ours."""
    _, instruction = request.messages[-1]
    assert request.ground_truth is not None
    return {
        "instruction": instruction,
        "output_1": baseline_output(request.ground_truth),
        "output_2": request.text,
    }


def _preference(answer: dict[str, Any], value: float | None) -> Score:
    if value is None:
        said = clip(json.dumps(answer.get("message", {}).get("content")), 100)
        return Score(None, "parse_error", f"the answer states no preference: {said}")
    return Score(value - 1)
