"""Noise from seeds, and tokens from noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kstest

from qrpo_core.engines.sampling import _pick_nucleus, _pick_sorted, draw_tokens, uniforms

SEEDS = st.integers(0, 2**64 - 1)


def one(logits: list[float] | np.ndarray, noise: float, temperature: float = 1.0, top_p: float = 1.0) -> int:
    tokens, _ = draw_tokens(
        torch.tensor(np.asarray(logits))[None], torch.tensor([noise], dtype=torch.float64), temperature, top_p
    )
    return int(tokens[0])


def philox(key: int, count: int) -> list[int]:
    """The upper 53 bits of the first words of the generator."""
    low = (1 << 64) - 1
    words: list[int] = []
    for counter in range(1, count // 4 + 2):
        x, k = [counter, 0, 0, 0], [key, 0]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k[0], b & low, (a >> 64) ^ x[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B97F4A7C15) & low, (k[1] + 0xBB67AE8584CAA73B) & low]
        words += x
    return [word >> 11 for word in words[:count]]


class TestUniforms:
    @given(seed=SEEDS, short=st.integers(0, 20), more=st.integers(0, 20))
    def test_more_numbers_change_none_of_the_first(self, seed: int, short: int, more: int) -> None:
        assert (uniforms(seed, short + more)[:short] == uniforms(seed, short)).all()

    @pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1])
    def test_the_stream_is_philox(self, seed: int) -> None:
        """Stored samples are drawn again from these numbers, so they must never change: against Philox
        written out here (Salmon et al. 2011, 4 words of 64 bits, 10 rounds, counter from 1)."""
        np.testing.assert_array_equal(uniforms(seed, 7), [word * 2.0**-53 for word in philox(seed, 7)])

    def test_uniform_over_seeds_and_over_steps(self) -> None:
        first = np.array([uniforms(seed, 1)[0] for seed in range(5000)])
        along = uniforms(12345, 5000)
        assert kstest(first, "uniform").pvalue > 1e-3
        assert kstest(along, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(along[:-1], along[1:])[0, 1]) < 0.05
        assert first.min() >= 0.0
        assert first.max() < 1.0


class TestDraw:
    @given(
        logits=hnp.arrays(
            np.float32, st.sampled_from([1, 2, 255, 256, 257, 700]), elements=st.floats(-20, 20, width=32)
        ),
        noise=st.floats(0, 1, exclude_max=True),
        temperature=st.sampled_from([0.3, 1.0, 2.0]),
    )
    def test_inverts_the_cumulative_distribution(
        self, logits: np.ndarray, noise: float, temperature: float
    ) -> None:
        """Token k is drawn where the mass before it is <= noise < the mass with it (float32 weights)."""
        weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
        running = np.cumsum(weights) / weights.sum()
        token = one(logits, noise, temperature)
        assert (running[token - 1] if token else 0.0) <= noise + 1e-5
        assert running[token] >= noise - 1e-5

    @given(
        logits=hnp.arrays(np.float32, st.sampled_from([3, 256, 1500]), elements=st.floats(-5, 5, width=32)),
        noise=st.floats(0, 1, exclude_max=True),
        top_p=st.floats(0.05, 0.999),
    )
    def test_top_p_keeps_the_smallest_set_that_holds_the_mass(
        self, logits: np.ndarray, noise: float, top_p: float
    ) -> None:
        """The mass of more probable tokens has not reached top_p. 1,500 nearly equal tokens need the sort
        of the whole row. Weights are float32: logits of up to 10 (after the shift) leave them 2e-6 of error,
        so closer weights may come in either order."""
        weights = np.exp(logits.astype(np.float64))
        weights /= weights.sum()
        token = one(logits, noise, top_p=top_p)
        assert weights[weights > weights[token] * (1 + 2e-6)].sum() < top_p + 1e-6

    @given(seed=SEEDS, top_p=st.floats(0.05, 0.999))
    def test_rows_sorted_whole_draw_the_same(self, seed: int, top_p: float) -> None:
        """As accelerators do; no two of the weights are equal, so no order of ties shows."""
        rng = np.random.default_rng(seed)
        weights = torch.tensor(rng.permutation(4500).reshape(3, 1500) + 1.0, dtype=torch.float32)
        noise, total = torch.tensor(rng.random(3)), weights.sum(dim=-1, dtype=torch.float64)
        best, order = weights.sort(dim=-1, descending=True, stable=True)
        whole = _pick_sorted(best, order, total, noise, top_p)
        assert torch.equal(whole, _pick_nucleus(weights, noise, top_p))

    def test_a_certain_token_is_drawn_whatever_the_noise(self) -> None:
        logits = np.full(1000, -np.inf, dtype=np.float32)
        for certain in (0, 255, 256, 999):
            logits[:] = -np.inf
            logits[certain] = 3.0
            for noise in (0.0, 0.5, 1 - 2**-53):
                for top_p in (1.0, 0.5):
                    assert one(logits, noise, top_p=top_p) == certain

    def test_rare_tokens_are_not_lost(self) -> None:
        """A token of probability 3e-9 behind one of nearly 1: a float32 running sum would never reach it."""
        logits = np.zeros(2, dtype=np.float32)
        logits[1] = np.log(3e-9)
        assert one(logits, 1 - 2e-9) == 1
        assert one(logits, 1 - 4e-9) == 0

    def test_logprob_is_at_temperature_one(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 0.5]])
        noise = torch.tensor([0.99], dtype=torch.float64)
        plain = torch.log_softmax(logits.double(), -1)[0]
        for temperature, top_p in ((1.0, 1.0), (0.2, 1.0), (3.0, 0.4)):
            tokens, logprobs = draw_tokens(logits, noise, temperature, top_p)
            assert float(logprobs[0]) == pytest.approx(float(plain[tokens[0]]), abs=1e-6)

    @given(seed=SEEDS, top_p=st.sampled_from([1.0, 0.9, 0.5]), rows=st.integers(1, 9))
    def test_rows_do_not_see_each_other(self, seed: int, top_p: float, rows: int) -> None:
        """Bit for bit, log-probs included, in whatever company and place (more than one row)."""
        rng = np.random.default_rng(seed)
        logits = torch.tensor(rng.normal(0, 3, (rows + 1, 1300)), dtype=torch.float32)
        noise = torch.tensor(rng.random(rows + 1))
        tokens, logprobs = draw_tokens(logits, noise, 1.3, top_p)
        order = torch.tensor(rng.permutation(rows + 1)[:2])
        again, same = draw_tokens(logits[order], noise[order], 1.3, top_p)
        assert torch.equal(again, tokens[order])
        assert torch.equal(same, logprobs[order])
