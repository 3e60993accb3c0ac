"""The chunked output head: its memory by the formula, what it launches, compiled kernels, bfloat16."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from qrpo_core.objective import head_kernels
from qrpo_core.objective.chunked_head import (
    GPU_CHUNK_SHARE,
    chunk_bytes,
    even_chunks,
    head_bytes,
    logit_bytes,
)
from qrpo_core.objective.logprobs import label_logprobs


def problem(states=70, dim=16, vocab=301, weights=torch.float32, seed=0, train="all"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(states, dim, generator=generator).to(weights).requires_grad_(train != "none")
    weight = torch.randn(vocab, dim, generator=generator).to(weights).requires_grad_(train == "all")
    return hidden, weight, torch.randint(vocab, (states,), generator=generator)


def gradients(hidden, weight, labels, bias=None, **options):
    """Log-probs, and the gradients of a sum with weights that differ between rows."""
    out = label_logprobs(hidden, weight, labels, bias, **options)
    upstream = torch.linspace(-1, 2, len(labels), dtype=out.dtype)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def traced(call):
    """(most bytes allocated at one time, operations of torch by name) of a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    events = seen.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(itertools.accumulate((size for _, size in steps), initial=0))
    return peak, Counter(event.name() for event in events)


class TestSizes:
    @given(states=st.integers(0, 500), most=st.integers(1, 600))
    def test_chunks_are_few_and_alike_and_hold_every_state_once(self, states, most):
        chunks = even_chunks(states, most)
        assert [row for part in chunks for row in range(part.start, part.stop)] == list(range(states))
        assert len(chunks) == -(-states // most)
        sizes = [part.stop - part.start for part in chunks]
        assert all(size <= most for size in sizes)
        assert len(set(sizes[:-1])) <= 1

    def test_a_chunk_of_the_cpu_is_256_states_of_49152_bfloat16_logits(self):
        a_state = 49152 * logit_bytes(torch.bfloat16, rounded=True, softcap=False)
        assert chunk_bytes(torch.device("cpu")) // a_state == 256

    def test_a_chunk_of_80_gb_is_2400_states_of_128256_bfloat16_logits(self):
        a_state = 128256 * logit_bytes(torch.bfloat16, rounded=False, softcap=False)
        assert 80 * 10**9 // GPU_CHUNK_SHARE // a_state == 2436

    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
    @pytest.mark.parametrize("train", ["none", "states", "all"])
    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("states", [1, 120, 1100])
    def test_the_formula_gives_the_peak_that_is_measured(
        self, monkeypatch, weights, autocast, train, softcap, states
    ):
        dim, vocab, chunk = 32, 4096, 1 << 22
        monkeypatch.setattr("qrpo_core.objective.chunked_head.CPU_CHUNK_BYTES", chunk)
        for module in ("chunked_head", "head_kernels"):
            monkeypatch.setattr(f"qrpo_core.objective.{module}.PRODUCT_ROWS", vocab // 4)
        hidden, weight, labels = problem(states, dim, vocab, weights, train=train)
        products = torch.bfloat16 if autocast else weights

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = label_logprobs(hidden, weight, labels, logit_softcap=softcap).sum()
            if train != "none":
                out.backward()
            return out

        step()
        hidden.grad = weight.grad = None
        peak, _ = traced(step)
        expected = head_bytes(
            states,
            vocab,
            dim,
            weights=weights,
            products=products,
            gradients=train,
            chunk=chunk,
            rounded=products == torch.bfloat16,
            softcap=softcap is not None,
        )
        # For products in bfloat16 a CPU's matrix library takes memory of its own, for every thread.
        above = (0.25 * expected, 1 << 18) if products == torch.bfloat16 else (0.01 * expected, 4096)
        assert 0.9 * expected <= peak <= expected + sum(above)

    def test_the_memory_does_not_grow_with_the_states_times_the_vocabulary(self):
        sizes = {"vocabulary": 49152, "dim": 576, "weights": torch.float32, "products": torch.float32}
        peaks = [head_bytes(256 * chunks, **sizes, gradients="all", chunk=96 << 20) for chunks in (40, 80)]
        assert peaks[1] - peaks[0] == 256 * 40 * (576 + 2) * 4  # the states' gradient, two numbers a state


class TestWhatIsLaunched:
    def operations(self, vocab=4096, chunk=40, **options):
        hidden, weight, labels = problem(120, 16, vocab)
        return traced(lambda: gradients(hidden, weight, labels, chunk_tokens=chunk, **options))[1]

    def test_a_chunk_reads_and_writes_logits_a_few_times(self):
        seen = self.operations()
        chunks = 3
        # Forward: one product and one log-softmax. Backward: the product again, then exp(logits - logsumexp).
        wanted = {
            "aten::mm": 3,
            "aten::addmm": 1,
            "aten::_log_softmax": 1,
            "aten::exp": 1,
            "aten::scatter_": 1,
        }
        for name, times in wanted.items():
            assert seen[name] == times * chunks, name
        for name in ("_softmax", "logsumexp", "index_add_", "div", "tanh", "square"):
            assert seen[f"aten::{name}"] == 0, name

    def test_the_weights_gradient_is_summed_inside_the_products_and_never_set_to_zero(self):
        seen = self.operations()
        assert seen["aten::addmm"] == 3
        assert seen["aten::zeros_like"] == 0

    def test_nothing_waits_for_the_device(self):
        seen = self.operations()
        assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"} & set(
            seen
        )


class TestCompiled:
    @pytest.fixture
    def switched_on(self):
        yield head_kernels.compile_head
        head_kernels.uncompile_head()
        torch._dynamo.reset()

    @pytest.mark.parametrize("options", [{}, {"logit_softcap": 3.0, "temperature": 0.7, "logit_scale": 0.5}])
    def test_compiled_kernels_give_the_same(self, switched_on, options):
        hidden, weight, labels = problem()
        bias = torch.linspace(-1, 1, len(weight)).requires_grad_()
        before = gradients(hidden, weight, labels, bias, chunk_tokens=32, **options)
        switched_on("aot_eager")
        after = gradients(hidden, weight, labels, bias, chunk_tokens=32, **options)
        assert len(head_kernels._compiled) == 2  # nothing fell back
        for mine, theirs in zip(after, before, strict=True):
            torch.testing.assert_close(mine, theirs)

    def test_chunks_of_every_size_share_a_compilation(self, switched_on):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        switched_on(backend)
        for states in (70, 64, 33, 90):
            gradients(*problem(states), chunk_tokens=32)
        assert len(graphs) == 2

    def test_what_does_not_compile_runs_uncompiled_and_says_so(self, switched_on, caplog):
        def broken(graph, inputs):
            raise RuntimeError("no compiler on this machine")

        hidden, weight, labels = problem()
        before = gradients(hidden, weight, labels)
        switched_on(broken)
        after = gradients(hidden, weight, labels)
        assert not head_kernels._compiled
        assert caplog.text.count("runs uncompiled") == 2
        assert "no compiler on this machine" in caplog.text
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(after, before, strict=True))

    def test_running_out_of_memory_is_not_taken_for_a_failing_compiler(self, switched_on):
        def full(graph, inputs):
            def run(*arguments):
                raise torch.OutOfMemoryError("out of memory")

            return run

        hidden, weight, labels = problem()
        switched_on(full)
        with pytest.raises(torch.OutOfMemoryError):
            label_logprobs(hidden, weight, labels)
        assert len(head_kernels._compiled) == 2


def exact(hidden, weight, labels, bias, logit_scale=1.0, logit_softcap=None, temperature=1.0):
    """Log-probs in float64 of the given values, the plain way."""
    leaves = [
        None if leaf is None else leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)
    ]
    logits = F.linear(*leaves) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    out = torch.log_softmax(logits / temperature, -1).gather(1, labels[:, None]).squeeze(1)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, wanted, torch.linspace(-1, 2, len(labels), dtype=torch.float64))]


@given(
    chunk=st.integers(1, 80) | st.none(),
    softcap=st.none() | st.floats(1.0, 30.0),
    temperature=st.floats(0.3, 3.0),
    scale=st.floats(0.1, 2.0),
    with_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_float64_within_the_products_rounding(
    chunk, softcap, temperature, scale, with_bias, dtype, seed
):
    hidden, weight, labels = problem(weights=dtype, seed=seed)
    bias = None
    if with_bias:
        bias = torch.linspace(-1, 1, len(weight)).to(dtype).requires_grad_()
    options = {"logit_scale": scale, "logit_softcap": softcap, "temperature": temperature}
    mine = gradients(hidden, weight, labels, bias, chunk_tokens=chunk, **options)
    # In bfloat16 a product is rounded by up to 2^-8 of itself; in float32 16 roundings are summed.
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-20
    wanted = exact(hidden, weight, labels, bias, **options)
    largest = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()).abs().max()
    moved = unit * largest.item() * scale / temperature  # a logit, by so much at most
    assert (mine[0].double() - wanted[0]).abs().max() <= 2 * moved + 32 * 2**-24 * 100
    for found, true in zip(mine[1:], wanted[1:], strict=True):
        assert found.dtype == dtype
        assert (found.double() - true).norm() <= 4 * (unit + moved) * true.norm()


def test_a_rounded_product_in_parts_is_the_whole_product(monkeypatch):
    hidden, weight, labels = problem(weights=torch.bfloat16)
    whole = gradients(hidden, weight, labels, chunk_tokens=30)
    monkeypatch.setattr("qrpo_core.objective.head_kernels.PRODUCT_ROWS", 100)
    for part, one in zip(gradients(hidden, weight, labels, chunk_tokens=30), whole, strict=True):
        # A part may be summed in another order, which moves a number by one rounding to bfloat16 at most.
        assert torch.allclose(part.float(), one.float(), rtol=2**-7, atol=2**-9)


def test_gradients_are_the_same_every_time():
    hidden, weight, labels = problem(300, vocab=64)
    labels[:] = 3  # rows of one label meet in one row of the weight's gradient
    runs = [gradients(hidden, weight, labels, chunk_tokens=100) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_products_with_float32_results_are_asked_for_once_and_not_believed_on_a_cpu():
    assert not head_kernels.wide_results("cpu", torch.bfloat16)
