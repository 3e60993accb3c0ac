"""The contract of engines on the real small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qrpo_core.common.hashing import sample_seed
from qrpo_core.engines.base import SampleRequest, SamplingParams
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.chat import Chat
from tests.contracts.engine_cases import scores


@pytest.mark.slow
@pytest.mark.long
class TestTheRealModel:
    """The law and the agreement of log-probs on SmolLM2: real widths, thread splits and vocabulary."""

    @pytest.fixture(scope="class")
    def asked(self, smollm2: Path) -> list[SampleRequest]:
        chat = Chat.load(smollm2)
        texts = ["Hi", "Name a river.", "What is 3 + 4?", "Tell me about rain in one short sentence, please."]
        prompts = [chat.prompt_token_ids([{"role": "user", "content": text}]) for text in texts]
        return [
            SampleRequest(text, index, prompt, sample_seed(0, text, index))
            for text, prompt in zip(texts, prompts, strict=True)
            for index in range(20)
        ]

    @pytest.mark.parametrize("top_p", [1.0, 0.9])
    def test_law_and_logprobs(self, smollm2: Path, asked: list[SampleRequest], top_p: float) -> None:
        chat = Chat.load(smollm2)
        engine = TransformersEngine(smollm2, "bfloat16", 16)
        params = SamplingParams(1.0, top_p, 6, chat.stop_token_ids)
        drawn = engine.sample(asked, params)
        assert engine.exact
        rows = [79, 3, 41, 22, 60, 5]
        assert engine.sample([asked[row] for row in rows], params) == [drawn[row] for row in rows]
        sums = engine.logprobs(scores(asked[::8], drawn[::8]))
        limit = 1.0 if engine.name.endswith("bfloat16") else 2e-3
        np.testing.assert_allclose(sums, [c.logprob for c in drawn[::8]], rtol=0, atol=limit)
        engine.close()
