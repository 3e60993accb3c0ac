"""Decoding with several steps between two looks: the rows of one step at a time, and no look in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, DynamicCache

from qrpo_core.common.errors import EngineError
from qrpo_core.engines.base import Completion, SampleRequest, SamplingParams
from qrpo_core.engines.batching import DecodeBatch, decode_batches
from qrpo_core.engines.decode_steps import Decoder, DecodeSteps
from qrpo_core.engines.decoding import BatchDecoding
from qrpo_core.engines.slot_cache import ATTENTION, SlotCache, position_bytes
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.loading import load_model
from tests.rounding import reordered

SLOTS = 8
#: As in test_transformers.py: operations from a weight to a log-prob.
ROUNDINGS = 2_000


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = load_model(tiny_model, "float32")
    model.set_attn_implementation(ATTENTION)
    return model


def steps_like(
    decoder: Decoder, batch: DecodeBatch, params: SamplingParams, run: int, like: Cache
) -> DecodeSteps:
    return DecodeSteps(decoder, SlotCache(like, batch.slots, batch.positions), params, run)


def sample(
    model: Any, requests: list[SampleRequest], params: SamplingParams, run: int, **shape: Any
) -> list[Completion]:
    """All requests in one batch of 8 slots, looked at after every `run` steps."""
    (batch,) = decode_batches(requests, params.max_new_tokens, slots=SLOTS)
    decoder = Decoder(model)
    new = partial(steps_like, decoder, batch, params, run)
    with torch.inference_mode():
        done = dict(BatchDecoding(decoder, batch, requests, params, new, steps_per_look=run, **shape))
    return [done[index] for index in range(len(requests))]


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[SampleRequest], SamplingParams]:
    """Up to 30 rows of few prompts, some of which stop early."""
    prompts = draw(st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=20), min_size=1, max_size=6))
    rows = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**64 - 1)), min_size=1, max_size=30))
    requests = [
        SampleRequest(f"p{at}", at, tuple(prompts[choice % len(prompts)]), seed)
        for at, (choice, seed) in enumerate(rows)
    ]
    stops = tuple(draw(st.lists(st.integers(0, 261), max_size=120, unique=True)))
    limit = draw(st.integers(1, 24))
    return requests, SamplingParams(1.0, draw(st.sampled_from([1.0, 0.8])), limit, stops)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of operations, and the devices of the tensors that they take and make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        self.names.add(func.overloadpacket.__name__)
        self.devices |= {tensor.device.type for tensor in tensors}
        return made


class TestRuns:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(task=tasks(), run=st.sampled_from([2, 5, 16, 40]))
    def test_are_single_steps_bit_for_bit(
        self, model: Any, task: tuple[list[SampleRequest], SamplingParams], run: int
    ) -> None:
        """Tokens, finish reasons and log-probs; what a row draws after its end is discarded."""
        requests, params = task
        assert sample(model, requests, params, run) == sample(model, requests, params, 1)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(task=tasks(), run=st.sampled_from([1, 16]), tokens=st.sampled_from([1, 50, 10_000]))
    def test_prompts_in_one_pass_are_those_alone(
        self, model: Any, task: tuple[list[SampleRequest], SamplingParams], run: int, tokens: int
    ) -> None:
        """Right-padded prompts, admitted in groups: the same tokens, and log-probs but for rounding."""
        requests, params = task
        alone = sample(model, requests, params, 1)
        together = sample(model, requests, params, run, prefill_tokens=tokens)
        assert [row.token_ids for row in together] == [row.token_ids for row in alone]
        sums, plain = (np.array([row.logprob for row in rows], np.float64) for rows in (together, alone))
        np.testing.assert_allclose(sums, plain, rtol=reordered(ROUNDINGS))

    def test_the_host_looks_once_a_run(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """24 rows of 50 tokens in 8 slots: three times 4 runs, and no number is read within one."""
        operations = Operations()
        lengths: list[int] = []
        ours: Callable[..., Any] = DecodeSteps.run

        def counted(self: DecodeSteps, tokens: Any, places: Any, noise: Any) -> Any:
            lengths.append(len(noise))
            with operations:
                return ours(self, tokens, places, noise)

        monkeypatch.setattr(DecodeSteps, "run", counted)
        requests = [SampleRequest(f"p{i}", i, (i, 7), i) for i in range(3 * SLOTS)]
        sample(model, requests, SamplingParams(1.0, 1.0, 50, ()), 16, prefill_tokens=1000)
        assert lengths == 3 * [16, 16, 16, 2]
        assert "index_copy_" in operations.names
        assert not operations.names & {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}

    @pytest.mark.parametrize("top_p", [1.0, 0.8])
    def test_a_step_off_the_cpu_needs_no_numbers(self, tiny_model: Path, top_p: float) -> None:
        """On torch's device without values, whatever depends on one fails, and a tensor of the host shows:
        a step with either could not be captured."""
        model = load_model(tiny_model, "float32").to("meta")
        model.set_attn_implementation(ATTENTION)
        like = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"), past_key_values=like)
            cache = SlotCache(like, SLOTS, 96)
            steps = DecodeSteps(Decoder(model), cache, SamplingParams(1.0, top_p, 9, ()), 4)
            cache.visible = 32
            steps._step()  # what a model keeps from its first step is not made by the second
            with Operations() as operations:
                steps._step()
        assert operations.devices == {"meta"}
        assert steps._drawn.shape == (2, 4, SLOTS)


#: One prompt, so that slots take rows in the order of the requests.
EIGHT = [SampleRequest(f"p{i}", i, (5, 6, 7), i) for i in range(SLOTS)]


class TestNumbersThatAreNone:
    """Logits of slot 3 are NaN from decoding step 12 on."""

    def broken(self, model: Any) -> Any:
        calls = iter(range(1000))

        def spoil(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            if next(calls) >= 12:
                logits = logits.clone()
                logits[3] = float("nan")
            return logits

        return model.lm_head.register_forward_hook(spoil)

    @pytest.mark.parametrize("run", [1, 5, 16])
    def test_are_an_error_that_names_the_row(self, model: Any, run: int) -> None:
        hook = self.broken(model)
        try:
            with pytest.raises(EngineError, match=r"not finite at new token 12 .*prompt p3, sample 3"):
                sample(model, EIGHT, SamplingParams(1.0, 1.0, 20, ()), run)
        finally:
            hook.remove()

    def test_after_a_rows_end_are_nothing(self, model: Any) -> None:
        params = SamplingParams(1.0, 1.0, 14, ())
        (third,) = sample(model, EIGHT[3:4], params, 1)
        stops = SamplingParams(1.0, 1.0, 14, third.token_ids[-3:-2])
        good = sample(model, EIGHT, stops, 1)
        assert len(good[3].token_ids) <= 12
        assert max(len(row.token_ids) for row in good) > 12
        hook = self.broken(model)
        try:
            assert sample(model, EIGHT, stops, 16) == good
        finally:
            hook.remove()


class TestTheCache:
    def test_fewer_visible_positions_change_nothing(self, model: Any) -> None:
        decoder = Decoder(model)
        with torch.inference_mode():
            like = decoder.prefill([(1, 2, 3, 4), (5,)])
            cache = SlotCache(like, SLOTS, 96)
            cache.place([0, 5, 6], like, [0, 1, 0])
            cache.places.copy_(torch.tensor([4, 0, 0, 0, 0, 1, 4, 0]))
            tokens = torch.arange(SLOTS)
            whole = decoder.step(cache, tokens)
            cache.visible = 8
            short = decoder.step(cache, tokens)
        torch.testing.assert_close(short, whole, rtol=reordered(ROUNDINGS), atol=reordered(ROUNDINGS))

    def test_bytes_of_a_position(self, model: Any) -> None:
        """Two layers, keys and values, key-value heads of some dimension, float32."""
        config = model.config
        with torch.inference_mode():
            like = Decoder(model).prefill([(1, 2)])
        expected = 2 * 2 * config.num_key_value_heads * config.head_dim * 4
        assert position_bytes(like) == expected


class TestTheEngineOffTheCpu:
    @pytest.fixture
    def engine(self, tiny_model: Path) -> TransformersEngine:
        """Takes its tensors, which are on a CPU, for those of a GPU: schedule and buffers are a GPU's."""
        engine = TransformersEngine(tiny_model, "float32", 16, device="cpu")
        engine._device = torch.device("cuda")
        return engine

    def test_rows_are_those_of_a_cpu(self, engine: TransformersEngine, tiny_model: Path) -> None:
        requests = [SampleRequest(f"p{i}", i, tuple(range(i % 9 * 9 + 1)), i) for i in range(70)]
        params = SamplingParams(1.0, 1.0, 40, tuple(range(0, 250, 25)))
        plain = TransformersEngine(tiny_model, "float32", device="cpu").sample(requests, params)
        assert [row.token_ids for row in engine.sample(requests, params)] == [row.token_ids for row in plain]

    def test_buffers_stay_while_they_fit(self, engine: TransformersEngine) -> None:
        short, long = ([SampleRequest("p", 0, (1,) * length, 7)] for length in (30, 200))
        params = SamplingParams(1.0, 1.0, 20, ())
        engine.sample(long, params)
        first = engine._steps
        engine.sample(short, params)
        assert engine._steps is first
        engine.sample(short, SamplingParams(0.7, 1.0, 20, ()))
        assert engine._steps is not first
        smaller = engine._steps
        engine.sample(long, SamplingParams(0.7, 1.0, 20, ()))
        assert engine._steps is not smaller


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a captured step needs CUDA")
class TestCaptured:
    @pytest.mark.parametrize("top_p", [1.0, 0.8])
    def test_steps_draw_what_plain_ones_draw(self, tiny_model: Path, top_p: float) -> None:
        """In float32, with rows that stop early, and a second call."""
        engine = TransformersEngine(tiny_model, "float32", device="cuda")
        requests = [
            SampleRequest(f"p{i}", i, tuple(range(1 + i % 5 * 60 % 250)) or (1,), i) for i in range(100)
        ]
        params = SamplingParams(1.0, top_p, 60, (3, 4))
        drawn = engine.sample(requests, params)
        steps = engine._steps
        assert steps is not None
        assert steps._captures
        assert len(steps._graphs) >= 1
        again = engine.sample(requests[:50], params)
        assert engine._steps is steps
        plain = TransformersEngine(tiny_model, "float32", device="cpu").sample(requests, params)
        same = [one.token_ids == other.token_ids for one, other in zip(drawn, plain, strict=True)]
        assert sum(same) >= 0.9 * len(same)
        assert sum(a == b for a, b in zip(again, drawn[:50], strict=True)) >= 45
