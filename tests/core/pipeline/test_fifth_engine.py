"""An engine that only this file knows, registered by one line, does all that comes before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.kinds import KINDS, EngineKind, EngineRequest
from qrpo_core.inspection.memory import stage_memory
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.stage_work import work_of
from qrpo_core.models.loading import load_model
from qrpo_core.pipeline.parity import ParityCheck, parity_check
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.row_steps import SampleStep
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute
from tests.rounding import reordered

FIFTH = "plain"


class PlainEngine(Engine):
    """The policy, with a whole pass for each token."""

    name = FIFTH
    exact = True

    def __init__(self, directory: Path) -> None:
        self._model: Any = load_model(directory, "float32")

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, progress: Progress = no_progress
    ) -> list[Completion]:
        return [self._draw(request, params) for request in requests]

    def token_logprobs(
        self, sequences: Sequence[LogprobRequest], progress: Progress = no_progress, temperature: float = 1.0
    ) -> list[npt.NDArray[np.float64]]:
        rows = []
        for each in sequences:
            table = self._logprobs((*each.prompt_token_ids, *each.token_ids), temperature)
            places = np.arange(len(each.token_ids)) + len(each.prompt_token_ids) - 1
            rows.append(table[places, list(each.token_ids)])
        return rows

    def close(self) -> None:
        self._model = None

    def _logprobs(self, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float64]:
        """log-softmax after each token, [tokens, vocabulary]."""
        with torch.no_grad():
            logits = self._model(torch.tensor([tokens])).logits[0]
        found: npt.NDArray[np.float64] = torch.log_softmax(logits.double() / temperature, -1).numpy()
        return found

    def _draw(self, request: SampleRequest, params: SamplingParams) -> Completion:
        numbers, drawn, logprob = np.random.default_rng(request.seed), list[int](), 0.0
        while len(drawn) < params.max_new_tokens and not set(drawn) & set(params.stop_token_ids):
            last = self._logprobs((*request.prompt_token_ids, *drawn), params.temperature)[-1]
            drawn.append(int(numbers.choice(len(last), p=np.exp(last) / np.exp(last).sum())))
            logprob += float(last[drawn[-1]])
        ended = "stop" if drawn[-1] in params.stop_token_ids else "length"
        row = (request.prompt_id, request.sample_index, request.seed)
        return Completion(*row, tuple(drawn), ended, logprob)  # type: ignore[arg-type]


class PlainKind(EngineKind):
    def make(self, asked: EngineRequest) -> Engine:
        return PlainEngine(asked.directory)


def test_a_fifth_engine_is_its_class_its_kind_and_one_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, FIFTH, PlainKind(FIFTH))
    known = changed(settings, sampling={"engine": "transformers"}, parity={"rows": 4})
    # The setting names the project's own engines alone, so this one comes in past its check.
    asked = known.model_copy(update={"sampling": known.sampling.model_copy(update={"engine": FIFTH})})
    workspace = Workspace(asked)
    check(workspace)
    stages = {stage.stage: stage.missing for stage in plan(workspace)}
    steps, computed = precompute(asked)
    assert computed == {label: stages[label] for label in computed}
    assert all(computed.values())
    assert {stage.missing for stage in plan(Workspace(asked)) if stage.stage in computed} == {0}

    samples = steps.first.row_steps[0]
    assert isinstance(samples, SampleStep)
    rows = samples.read([(key, index) for key, wanted in samples.wanted.items() for index in wanted])
    assert set(rows["engine"].to_pylist()) == {FIFTH}
    again, _ = precompute(known)
    assert again.first.row_steps[0].recipe == samples.recipe  # the policy's rows, whichever engine drew them

    compared = parity_check(samples)
    assert isinstance(compared, ParityCheck)
    # A token's log-prob after some 2,000 operations in either's order, as in the contract of engines.
    limit = np.exp(np.log(262) * reordered(2_000))
    assert 1 <= compared.build(lambda count: None).facts["largest"] <= limit

    assert work_of(asked, samples.label).gpus == 1
    missing = [stage for stage in plan(Workspace(asked)) if stage.stage.startswith("sample held-out")]
    memory = stage_memory(workspace, missing, 1 << 30)
    assert [set(each.parts) for each in memory] == [{"weights", "cache of a row"}]
