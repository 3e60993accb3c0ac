"""What every engine must do: the law of sampling, finish reasons, limits, log-probs, distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from qrpo_core.data.chat import Chat
from qrpo_core.engines.base import Completion, Engine, SampleRequest, SamplingParams, ScoreRequest
from qrpo_core.engines.config import EndpointConfig
from qrpo_core.engines.fake import FakeEngine
from qrpo_core.engines.registry import make_engine
from qrpo_core.errors import EngineError
from qrpo_core.ids import sample_seed
from tests.vllm import shared as vllm

#: Prompt lengths: one token, many of one length, and enough for three sizes of table.
LENGTHS = (1, 2, 9, 9, 9, 30, 31, 60, 90, 120, 170)
SAMPLES = 10
MAX_LENGTH = 512


@dataclass(frozen=True)
class Case:
    """An engine under test.

    tolerance : nats a sequence between sample() and logprobs().
    exact : what the engine must say of itself. Where it is False, the law is not tested, and draws that the
        law makes equal may differ in one row of ten (last digits decide such a row).
    draws : samples that a distribution is judged by.
    """

    make: Callable[[int], Engine]
    vocab_size: int
    stops: tuple[int, ...]
    tolerance: float
    exact: bool = True
    draws: int = 2000

    def agree(self, one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> bool:
        """Whether rows of tokens are equal, all or nearly all."""
        assert len(one) == len(other)
        differing = sum(a != b for a, b in zip(one, other, strict=True))
        return differing == 0 if self.exact else differing <= len(one) / 10


def case_of(kind: str, directory: Path) -> Case:
    chat = Chat.load(directory)
    if kind == "fake":

        def fake(batch_size: int) -> Engine:
            return FakeEngine(chat.vocab_size, chat.stop_token_ids, max_length=MAX_LENGTH)

        return Case(fake, chat.vocab_size, chat.stop_token_ids, 1e-12)
    dtype = kind.removeprefix("transformers-")

    def real(batch_size: int) -> Engine:
        return make_engine("transformers", directory, dtype=dtype, batch_size=batch_size, chat=chat)

    # bfloat16 has 8 bits: a logit of 8 is known to 1/32. Where it is not native, arithmetic is float32.
    tolerance = 1.0 if real(1).name.endswith("bfloat16") else 1e-3
    return Case(real, chat.vocab_size, chat.stop_token_ids, tolerance)


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model for vLLM on the CPU, in an environment that lets it have little memory."""
    vllm.skip_without_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", vllm.KV_CACHE_GIB)
        yield vllm.write_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def vllm_case(vllm_model: Path) -> Iterator[Case]:
    """One process for all tests, since it takes long to start; another one once that is closed."""
    chat = Chat.load(vllm_model)
    engines: list[Engine] = []

    def shared(batch_size: int) -> Engine:
        if not engines or engines[-1]._closed:  # type: ignore[attr-defined]
            made = make_engine(
                "vllm", vllm_model, dtype="float32", batch_size=batch_size, chat=chat, vllm=vllm.CONFIG
            )
            engines.append(made)
        return engines[-1]

    yield Case(shared, chat.vocab_size, chat.stop_token_ids, 1e-3, exact=False)
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def endpoint_case(vllm_model: Path) -> Iterator[Case]:
    """vLLM's own server of the model; every engine is a new client."""
    chat = Chat.load(vllm_model)
    with vllm.server(vllm_model, "--dtype", "float32", "--served-model-name", "tiny") as url:

        def client(batch_size: int) -> Engine:
            config = EndpointConfig(url=url, concurrency=batch_size, retry_seconds=0)
            made = make_engine(
                "endpoint", vllm_model, dtype="float32", batch_size=1, chat=chat, endpoint=config
            )
            assert made.name == "endpoint/tiny"
            return made

        yield Case(client, chat.vocab_size, chat.stop_token_ids, 1e-3, exact=False, draws=400)


_VLLM = (pytest.mark.slow, pytest.mark.vllm)


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "transformers-float32",
        "transformers-bfloat16",
        pytest.param("vllm", marks=_VLLM),
        pytest.param("endpoint", marks=_VLLM),
    ],
)
def case(request: pytest.FixtureRequest, tiny_model: Path) -> Case:
    if request.param in ("vllm", "endpoint"):
        found: Case = request.getfixturevalue(f"{request.param}_case")
        return found
    return case_of(request.param, tiny_model)


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
        good = ScoreRequest((1, 2), (3,))
        with pytest.raises(EngineError, match=r"513 tokens.*row 1"):
            engine.logprobs([good, ScoreRequest((1,) * 500, (2,) * 13)])
        with pytest.raises(EngineError, match=r"empty prompt.*row 0"):
            engine.logprobs([ScoreRequest((), (3,))])
        with pytest.raises(EngineError, match=r"token id -1.*row 1"):
            engine.logprobs([good, ScoreRequest((1,), (-1,))])

    def test_nothing_asked_nothing_given(self, engine: Engine, params: SamplingParams) -> None:
        assert engine.sample([], params) == []
        assert engine.logprobs([]).shape == (0,)


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
                ScoreRequest((5, 6), (7, 8, 9)),
                ScoreRequest((5, 6), (7,)),
                ScoreRequest((5, 6, 7), (8, 9)),
                ScoreRequest((5, 6), ()),
            ]
        )
        assert whole == pytest.approx(first + second, abs=case.tolerance / 10)
        assert nothing == 0.0

    def test_probabilities_sum_to_one(self, case: Case, engine: Engine) -> None:
        probabilities = np.exp(next_token_logprobs(engine, case, (5, 6, 7)))
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-4 if case.tolerance < 0.1 else 0.05)


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
        expected = self.expected(next_token_logprobs(engine, case, self.PROMPT), temperature, top_p)
        counts = np.bincount(drawn, minlength=case.vocab_size)
        assert counts[expected == 0].sum() == 0
        # Cells of fewer than five expected draws are put together, as the test's approximation asks.
        small = expected * len(drawn) < 5
        seen = np.append(counts[~small], counts[small].sum())
        hoped = np.append(expected[~small], expected[small].sum()) * len(drawn)
        seen, hoped = (seen, hoped) if hoped[-1] > 0 else (seen[:-1], hoped[:-1])
        assert len(seen) > 2
        assert chisquare(seen, hoped).pvalue > 1e-3

    @staticmethod
    def expected(logprobs: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
        weights = np.exp(logprobs / temperature)
        weights /= weights.sum()
        order = np.argsort(-weights)
        reached = np.cumsum(weights[order]) - weights[order]
        weights[order[reached >= top_p]] = 0.0
        return weights / weights.sum()


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


def test_a_closed_engine_refuses(case: Case, requests: list[SampleRequest], params: SamplingParams) -> None:
    engine = case.make(4)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.sample(requests[:1], params)
    with pytest.raises(EngineError, match="closed"):
        engine.logprobs([ScoreRequest((1,), (2,))])


def scores(requests: list[SampleRequest], drawn: list[Completion]) -> list[ScoreRequest]:
    return [ScoreRequest(r.prompt_token_ids, c.token_ids) for r, c in zip(requests, drawn, strict=True)]


def next_token_logprobs(engine: Engine, case: Case, prompt: tuple[int, ...]) -> np.ndarray:
    return engine.logprobs([ScoreRequest(prompt, (token,)) for token in range(case.vocab_size)])


@pytest.mark.slow
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
        engine = make_engine("transformers", smollm2, dtype="bfloat16", batch_size=16, chat=chat)
        params = SamplingParams(1.0, top_p, 6, chat.stop_token_ids)
        drawn = engine.sample(asked, params)
        assert engine.exact
        rows = [79, 3, 41, 22, 60, 5]
        assert engine.sample([asked[row] for row in rows], params) == [drawn[row] for row in rows]
        sums = engine.logprobs(scores(asked[::8], drawn[::8]))
        limit = 1.0 if engine.name.endswith("bfloat16") else 2e-3
        np.testing.assert_allclose(sums, [c.logprob for c in drawn[::8]], rtol=0, atol=limit)
        engine.close()
