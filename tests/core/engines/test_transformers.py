"""The transformers engine against the model itself, and what it refuses."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from qrpo_core.common.errors import EngineError, ModelError
from qrpo_core.engines.base import LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.sampling import uniforms
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model
from tests.rounding import reordered

#: Operations from a weight to a log-prob: sums over the features of two layers and over the vocabulary.
ROUNDINGS = 2_000

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=12, stop_token_ids=(257, 258))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(tiny_model, "float32", 8)


def asked(count: int, length: int = 10) -> list[SampleRequest]:
    return [SampleRequest(f"p{i}", i, tuple(range(i % 7, i % 7 + length)), i) for i in range(count)]


def save(model: torch.nn.Module, tiny_model: Path, out: Path) -> Path:
    """A model of another architecture with the tiny tokenizer."""
    model.save_pretrained(out)  # type: ignore[operator]
    for file in tiny_model.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


SIZES = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


class TestAgainstTheModel:
    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
    def test_decoding_is_the_plain_road_done_fast(
        self, tiny_model: Path, engine: TransformersEngine, temperature: float, top_p: float
    ) -> None:
        """Another road to the same tokens: no cache, no slots, the whole sequence forward for every token,
        the cumulative distribution written out in numpy."""
        model = load_model(tiny_model, "float32")
        params = SamplingParams(temperature, top_p, 12, PARAMS.stop_token_ids)
        requests = [*asked(5), *asked(3, length=1), *asked(2, length=100)]
        for request, drawn in zip(requests, engine.sample(requests, params), strict=True):
            tokens: list[int] = []
            for number in uniforms(request.seed, params.max_new_tokens):
                with torch.inference_mode():
                    ids = torch.tensor([[*request.prompt_token_ids, *tokens]])
                    logits = model(ids).logits[0, -1].double().numpy()
                weights = np.exp((logits - logits.max()) / temperature)
                weights /= weights.sum()
                if top_p == 1.0:
                    token = int(np.searchsorted(np.cumsum(weights), number, side="right"))
                else:
                    order = np.argsort(-weights)
                    kept = weights[order] * (np.cumsum(weights[order]) - weights[order] < top_p)
                    place = np.searchsorted(np.cumsum(kept), number * kept.sum(), side="right")
                    token = int(order[place])
                tokens.append(token)
                if token in params.stop_token_ids:
                    break
            assert drawn.token_ids == tuple(tokens)

    def test_logprobs_are_the_models_own(self, tiny_model: Path, engine: TransformersEngine) -> None:
        """Unpadded, all logits, log-softmax in float64."""
        model = load_model(tiny_model, "float32")
        sequences = [LogprobRequest(tuple(range(n)), tuple(range(40, 40 + 2 * n))) for n in (1, 3, 20)]
        for sequence, ours in zip(sequences, engine.logprobs(sequences), strict=True):
            prompt = len(sequence.prompt_token_ids)
            ids = torch.tensor([[*sequence.prompt_token_ids, *sequence.token_ids]])
            with torch.inference_mode():
                logprobs = model(ids).logits.double().log_softmax(-1)
            picked = logprobs[0, prompt - 1 : -1].gather(-1, ids[0, prompt:, None])
            assert ours == pytest.approx(float(picked.sum()), rel=reordered(ROUNDINGS))

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_precision_is_the_trainers(
        self, tiny_model: Path, engine: TransformersEngine, precision: str
    ) -> None:
        sequences = [LogprobRequest((1, 2, 3), tuple(range(20)))]
        other = TransformersEngine(tiny_model, "bfloat16", 8, precision)
        assert other._model.dtype == torch.float32  # never rounded to `dtype` first
        limit = 1.0 if other.name.endswith("autocast") else 0.0
        np.testing.assert_allclose(
            other.logprobs(sequences), engine.logprobs(sequences), rtol=reordered(ROUNDINGS), atol=limit
        )


class TestExactness:
    def test_a_machine_that_is_not_exact_is_found_out(self, tiny_model: Path) -> None:
        """A model whose rows depend on their slot in the last digit, as a kernel might make them."""
        engine = TransformersEngine(tiny_model, "float32", 8, device="cpu")
        assert engine.exact
        engine._model.lm_head.register_forward_hook(
            lambda _module, _inputs, logits: logits * (1 + 1e-7 * torch.arange(len(logits))[:, None, None])
        )
        engine.sample(asked(3), PARAMS)
        assert not engine.exact

    def test_a_model_that_mixes_rows_is_found_out(self, tiny_model: Path) -> None:
        engine = TransformersEngine(tiny_model, "float32", 8, device="cpu")
        assert engine.exact
        engine._model.lm_head.register_forward_hook(
            lambda _module, _inputs, logits: logits + 1e-3 * logits.mean(dim=0, keepdim=True)
        )
        engine.sample(asked(3), PARAMS)
        assert not engine.exact


class TestRefusals:
    def test_weights_that_are_not_finite(self, tiny_model: Path) -> None:
        engine = TransformersEngine(tiny_model, "float32", 8)
        engine._model.model.norm.weight.data[:] = float("nan")
        with pytest.raises(EngineError, match=r"not finite.*prompt p0, sample 0"):
            engine.sample(asked(1), PARAMS)
        engine._checked = True
        with pytest.raises(EngineError, match="not finite"):
            engine.logprobs([LogprobRequest((1,), (2,))])

    def test_an_attention_window_is_respected(self, tiny_model: Path, tmp_path: Path) -> None:
        """Within the window such a model is like any other; beyond it the engine says no."""
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24))
        engine = TransformersEngine(save(model, tiny_model, tmp_path / "window"), "float32", 8)
        drawn = engine.sample(asked(3), PARAMS)
        sums = engine.logprobs(
            [LogprobRequest(r.prompt_token_ids, c.token_ids) for r, c in zip(asked(3), drawn, strict=True)]
        )
        np.testing.assert_allclose(sums, [c.logprob for c in drawn], rtol=reordered(ROUNDINGS))
        with pytest.raises(EngineError, match="window of 24"):
            engine.sample(asked(1, length=12), PARAMS)

    def test_logits_that_a_family_scales_are_scored_as_its_own(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        from transformers import GraniteConfig, GraniteForCausalLM

        torch.manual_seed(0)
        model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.05, initializer_range=0.3))
        engine = TransformersEngine(save(model, tiny_model, tmp_path / "scaled"), "float32", 8)
        ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
        with torch.inference_mode():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        plain = sum(float(logprobs[at - 1, ids[0, at]]) for at in (4, 5, 6))
        assert engine.logprobs([LogprobRequest((1, 2, 3, 4), (5, 6, 7))])[0] == pytest.approx(
            plain, rel=reordered(ROUNDINGS, condition=20)
        )

    def test_missing_weights_are_never_filled_in(self, tiny_model: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        broken = tmp_path / "broken"
        broken.mkdir()
        for file in tiny_model.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        weights = load_file(broken / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
            TransformersEngine(broken, "float32", 8)


def test_close_gives_the_memory_back(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, "float32", 8)
    engine.sample(asked(2), PARAMS)
    weights = weakref.ref(engine._model.lm_head.weight)
    engine.close()
    gc.collect()
    assert weights() is None


def test_the_fake_engine_needs_no_heavy_imports() -> None:
    """A pipeline on the fake engine starts in seconds."""
    code = (
        "import sys; from qrpo_core.engines import kinds, fake; from qrpo_core.engines.base import *;"
        "e = fake.FakeEngine(100, (2,));"
        "e.sample([SampleRequest('p', 0, (1,), 5)], SamplingParams(1, 1, 4, (2,)));"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
