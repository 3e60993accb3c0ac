"""What every engine must do: the law of sampling, finish reasons, limits, log-probs, distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from qrpo_core.common.errors import EngineError
from qrpo_core.common.hashing import sample_seed
from qrpo_core.engines.base import Completion, Engine, LogprobRequest, SampleRequest, SamplingParams
from tests.contracts.engine_cases import (
    MAX_LENGTH,
    Case,
    next_token_logprobs,
    probabilities,
    scores,
)

#: Prompt lengths: one token, many of one length, and enough for three sizes of batch.
LENGTHS = (1, 2, 9, 9, 9, 30, 31, 60, 90, 120, 170)
SAMPLES = 10


@pytest.fixture(scope="module")
def engine(case: Case) -> Engine:
    return case.make(16)


@pytest.fixture(scope="module")
def requests(case: Case) -> list[SampleRequest]:
    """110 requests: 11 prompts of 10 samples."""
    rng = np.random.default_rng(0)
    prompts = [tuple(int(t) for t in rng.integers(0, 250, length)) for length in LENGTHS]
    return [
        SampleRequest(f"prompt{row}", index, prompt, sample_seed(0, f"prompt{row}", index))
        for row, prompt in enumerate(prompts)
        for index in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def params(case: Case) -> SamplingParams:
    return SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=16, stop_token_ids=case.stops)


@pytest.fixture(scope="module")
def drawn(engine: Engine, requests: list[SampleRequest], params: SamplingParams) -> list[Completion]:
    return engine.sample(requests, params)


def test_answers_come_in_the_order_of_the_requests(
    requests: list[SampleRequest], drawn: list[Completion]
) -> None:
    asked = [(r.prompt_id, r.sample_index, r.seed) for r in requests]
    assert [(c.prompt_id, c.sample_index, c.seed) for c in drawn] == asked
    assert len({c.token_ids for c in drawn}) > len(drawn) // 2  # seeds make samples differ


def test_exact_says_so(case: Case, engine: Engine, drawn: list[Completion]) -> None:
    assert engine.exact == case.exact


def test_the_seed_decides_the_draw(
    case: Case,
    engine: Engine,
    requests: list[SampleRequest],
    params: SamplingParams,
    drawn: list[Completion],
) -> None:
    """Also where rows are not exact: most are the same again, in another order and company."""
    again = engine.sample(requests[::-2], params)
    assert case.agree([c.token_ids for c in again], [c.token_ids for c in drawn[::-2]])


class TestTheLaw:
    """A row depends on its request alone, bit for bit: tokens and log-probs."""

    @pytest.fixture(autouse=True)
    def _exact_engines(self, case: Case) -> None:
        if not case.exact:
            pytest.skip("this engine says that it is not exact")

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_subset_in_any_order_at_any_batch_size(
        self,
        data: st.DataObject,
        case: Case,
        requests: list[SampleRequest],
        params: SamplingParams,
        drawn: list[Completion],
    ) -> None:
        rows = data.draw(st.lists(st.integers(0, len(requests) - 1), min_size=1, max_size=100, unique=True))
        engine = case.make(data.draw(st.sampled_from([1, 2, 3, 7, 16, 64])))
        again = engine.sample([requests[row] for row in rows], params)
        assert again == [drawn[row] for row in rows]

    def test_one_row_alone(
        self, engine: Engine, requests: list[SampleRequest], params: SamplingParams, drawn: list[Completion]
    ) -> None:
        for row in (0, 35, len(requests) - 1):
            assert engine.sample([requests[row]], params) == [drawn[row]]

    def test_more_samples_of_a_prompt_leave_the_first_ones(
        self, engine: Engine, requests: list[SampleRequest], params: SamplingParams, drawn: list[Completion]
    ) -> None:
        """More rows than slots, so that rows take over the slots of finished ones."""
        first = requests[20]
        more = [
            replace(first, sample_index=index, seed=sample_seed(0, first.prompt_id, index))
            for index in range(150)
        ]
        assert engine.sample(more, params)[:SAMPLES] == drawn[20 : 20 + SAMPLES]

    def test_with_temperature_and_top_p(
        self, engine: Engine, requests: list[SampleRequest], params: SamplingParams
    ) -> None:
        params = replace(params, temperature=1.3, top_p=0.7)
        together = engine.sample(requests[:80], params)
        assert engine.sample(requests[79::-7], params) == together[79::-7]


class TestFinish:
    def test_stop_means_an_end_token_and_length_means_the_limit(
        self, case: Case, params: SamplingParams, drawn: list[Completion]
    ) -> None:
        for completion in drawn:
            ended = completion.token_ids[-1] in case.stops
            assert completion.finish_reason == ("stop" if ended else "length")
            assert not set(completion.token_ids[:-1]) & set(case.stops)
            assert ended or len(completion.token_ids) == params.max_new_tokens
            assert 1 <= len(completion.token_ids) <= params.max_new_tokens
        assert {c.finish_reason for c in drawn} == {"stop", "length"}

    def test_every_end_token_ends(
        self, case: Case, engine: Engine, requests: list[SampleRequest], params: SamplingParams
    ) -> None:
        """With fewer end tokens the same draw goes on: the shorter completion is its beginning."""
        assert len(case.stops) > 1
        params = replace(params, max_new_tokens=40)
        both = engine.sample(requests, params)
        none = engine.sample(requests, replace(params, stop_token_ids=()))
        assert {c.token_ids[-1] for c in both if c.finish_reason == "stop"} == set(case.stops)
        assert {c.finish_reason for c in none} == {"length"}
        cut = [long.token_ids[: len(short.token_ids)] for short, long in zip(both, none, strict=True)]
        assert case.agree(cut, [short.token_ids for short in both])

    def test_one_new_token(
        self, engine: Engine, requests: list[SampleRequest], params: SamplingParams
    ) -> None:
        assert {len(c.token_ids) for c in engine.sample(requests, replace(params, max_new_tokens=1))} == {1}


class TestRefusals:
    def test_a_prompt_that_leaves_no_room_is_named(self, engine: Engine, params: SamplingParams) -> None:
        params = replace(params, max_new_tokens=4)
        fits = SampleRequest("fits", 0, (1,) * (MAX_LENGTH - 4), 7)
        assert len(engine.sample([fits], params)) == 1
        with pytest.raises(EngineError, match=r"509 tokens.*512.*long-one"):
            engine.sample([fits, replace(fits, prompt_id="long-one", prompt_token_ids=(1,) * 509)], params)

    def test_prompts_that_are_none(self, case: Case, engine: Engine, params: SamplingParams) -> None:
        with pytest.raises(EngineError, match=r"empty prompt.*here"):
            engine.sample([SampleRequest("here", 0, (), 7)], params)
        with pytest.raises(EngineError, match=rf"token id {case.vocab_size}.*here"):
            engine.sample([SampleRequest("here", 0, (case.vocab_size,), 7)], params)

    @pytest.mark.parametrize(
        "wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
    )
    def test_settings(self, engine: Engine, params: SamplingParams, wrong: dict[str, float]) -> None:
        with pytest.raises(EngineError, match=str(next(iter(wrong)))):
            engine.sample([], replace(params, **wrong))  # type: ignore[arg-type]

    def test_sequences_that_cannot_be_scored(self, engine: Engine) -> None:
        good = LogprobRequest((1, 2), (3,))
        for ask in (engine.logprobs, engine.token_logprobs):
            with pytest.raises(EngineError, match=r"513 tokens.*row 1"):
                ask([good, LogprobRequest((1,) * 500, (2,) * 13)])
            with pytest.raises(EngineError, match=r"empty prompt.*row 0"):
                ask([LogprobRequest((), (3,))])
            with pytest.raises(EngineError, match=r"token id -1.*row 1"):
                ask([good, LogprobRequest((1,), (-1,))])

    def test_nothing_asked_nothing_given(self, engine: Engine, params: SamplingParams) -> None:
        assert engine.sample([], params) == []
        assert engine.logprobs([]).shape == (0,)
        assert engine.token_logprobs([]) == []


class TestLogprobs:
    def test_agree_with_the_sampler(
        self, case: Case, engine: Engine, requests: list[SampleRequest], drawn: list[Completion]
    ) -> None:
        sums = engine.logprobs(scores(requests, drawn))
        assert sums.dtype == np.float64
        np.testing.assert_allclose(sums, [c.logprob for c in drawn], rtol=0, atol=case.tolerance)

    def test_are_at_temperature_one_however_the_row_was_drawn(
        self, case: Case, engine: Engine, requests: list[SampleRequest], params: SamplingParams
    ) -> None:
        cold = engine.sample(requests, replace(params, temperature=0.5, top_p=0.9))
        sums = engine.logprobs(scores(requests, cold))
        np.testing.assert_allclose(sums, [c.logprob for c in cold], rtol=0, atol=case.tolerance)

    def test_at_a_temperature_are_those_of_divided_logits_or_refused(
        self, case: Case, engine: Engine, requests: list[SampleRequest]
    ) -> None:
        """Log-probs are logits up to a constant: at T they are log_softmax(log-probs at 1 / T)."""
        prompt = requests[0].prompt_token_ids
        asked = [LogprobRequest(prompt, (token,)) for token in range(case.vocab_size)]
        if engine.name.startswith(("vllm", "endpoint")):
            with pytest.raises(EngineError, match=r"gives log-probs at temperature 1, not 0\.7"):
                engine.logprobs(asked[:2], temperature=0.7)
            return
        at_one = engine.logprobs(asked)
        for temperature in (0.7, 1.2):
            line = at_one / temperature
            expected = line - np.log(np.exp(line).sum())
            np.testing.assert_allclose(
                engine.logprobs(asked, temperature=temperature), expected, rtol=0, atol=2 * case.tolerance
            )
            (token,) = engine.token_logprobs(asked[5:6], temperature=temperature)
            np.testing.assert_allclose(token, expected[5:6], rtol=0, atol=2 * case.tolerance)
        with pytest.raises(EngineError, match="temperature"):
            engine.logprobs(asked[:2], temperature=0.0)

    def test_do_not_depend_on_batch_order_or_padding(
        self, case: Case, engine: Engine, requests: list[SampleRequest], drawn: list[Completion]
    ) -> None:
        asked = scores(requests, drawn)
        together = engine.logprobs(asked)
        order = np.random.default_rng(1).permutation(len(asked))
        for batch_size in (1, 5, 64):
            again = case.make(batch_size).logprobs([asked[row] for row in order])
            np.testing.assert_allclose(again, together[order], rtol=0, atol=case.tolerance / 10)

    def test_chain_rule(self, case: Case, engine: Engine) -> None:
        """log p(ab) = log p(a) + log p(b | a); no completion has log-probability 0."""
        whole, first, second, nothing = engine.logprobs(
            [
                LogprobRequest((5, 6), (7, 8, 9)),
                LogprobRequest((5, 6), (7,)),
                LogprobRequest((5, 6, 7), (8, 9)),
                LogprobRequest((5, 6), ()),
            ]
        )
        assert whole == pytest.approx(first + second, abs=case.tolerance / 10)
        assert nothing == 0.0

    def test_by_token_they_sum_to_those_of_the_sequences(
        self, case: Case, engine: Engine, requests: list[SampleRequest], drawn: list[Completion]
    ) -> None:
        asked = scores(requests, drawn)
        asked.insert(3, LogprobRequest((5, 6), ()))
        by_token = engine.token_logprobs(asked)
        assert {row.dtype for row in by_token} == {np.dtype(np.float64)}
        assert [row.shape for row in by_token] == [(len(request.token_ids),) for request in asked]
        assert all((row <= 0).all() for row in by_token)
        sums = [row.sum() for row in by_token]
        np.testing.assert_allclose(sums, engine.logprobs(asked), rtol=0, atol=case.tolerance / 10)

    def test_each_is_of_its_own_token(self, case: Case, engine: Engine) -> None:
        """After everything before it, whatever comes after it."""
        ids = (5, 6, 7, 8, 9, 10)
        (by_token,) = engine.token_logprobs([LogprobRequest(ids[:2], ids[2:])])
        alone = engine.logprobs([LogprobRequest(ids[:end], ids[end : end + 1]) for end in range(2, len(ids))])
        np.testing.assert_allclose(by_token, alone, rtol=0, atol=case.tolerance / 10)

    def test_probabilities_sum_to_one(self, case: Case, engine: Engine) -> None:
        found = np.exp(next_token_logprobs(engine, case, (5, 6, 7)))
        assert found.sum() == pytest.approx(1.0, abs=1e-4 if case.tolerance < 0.1 else 0.05)


class TestDistribution:
    """First tokens of many seeds against the engine's own probabilities: chi-square at fixed seeds."""

    PROMPT = (72, 105, 33)

    @pytest.mark.parametrize(
        ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 1.0), (1.0, 0.6), (1.5, 0.8)]
    )
    def test_frequencies(
        self, case: Case, engine: Engine, params: SamplingParams, temperature: float, top_p: float
    ) -> None:
        asked = [SampleRequest("p", i, self.PROMPT, sample_seed(3, "p", i)) for i in range(case.draws)]
        params = replace(params, temperature=temperature, top_p=top_p, max_new_tokens=1)
        drawn = [c.token_ids[0] for c in engine.sample(asked, params)]
        logprobs = next_token_logprobs(engine, case, self.PROMPT)
        expected = probabilities(logprobs, temperature, top_p)
        counts = np.bincount(drawn, minlength=case.vocab_size)
        # A step rounds logits otherwise than a pass, so a token at top_p's border may lie within.
        within = probabilities(logprobs, temperature, min(1.0, top_p * (1 + case.tolerance / 10)))
        assert counts[within == 0].sum() == 0
        counts = np.where(expected > 0, counts, 0)
        # Cells of fewer than five expected draws are put together, as the test's approximation asks.
        small = expected * counts.sum() < 5
        seen = np.append(counts[~small], counts[small].sum())
        hoped = np.append(expected[~small], expected[small].sum()) * counts.sum()
        seen, hoped = (seen, hoped) if hoped[-1] > 0 else (seen[:-1], hoped[:-1])
        assert len(seen) > 2
        assert chisquare(seen, hoped).pvalue > 1e-3


def test_progress_counts_every_row(
    engine: Engine, requests: list[SampleRequest], params: SamplingParams, drawn: list[Completion]
) -> None:
    steps: list[int] = []
    engine.sample(requests[:30], params, steps.append)
    assert sum(steps) == 30
    assert len(steps) > 1
    steps.clear()
    engine.logprobs(scores(requests[:30], drawn[:30]), steps.append)
    assert sum(steps) == 30
    steps.clear()
    engine.token_logprobs(scores(requests[:30], drawn[:30]), steps.append)
    assert sum(steps) == 30


def test_a_closed_engine_refuses(case: Case, requests: list[SampleRequest], params: SamplingParams) -> None:
    engine = case.make(4)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.sample(requests[:1], params)
    with pytest.raises(EngineError, match="closed"):
        engine.logprobs([LogprobRequest((1,), (2,))])
    with pytest.raises(EngineError, match="closed"):
        engine.token_logprobs([LogprobRequest((1,), (2,))])
