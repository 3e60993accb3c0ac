"""One suite for all kinds of reward: what every one of them promises."""

import json
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import STATUSES
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import Reward, RewardRequest, Score, refuse
from qrpo_core.rewards.registry import check_ground_truths, make_reward
from tests.rounding import reordered

SUM = {
    "task": "chain_sum",
    "parameters": {"min_terms": 2, "max_terms": 2},
    "entry": {"question": "4 - 1 =", "answer": "3", "metadata": {}},
}
FACTORS = {
    "task": "prime_factorization",
    "parameters": {},
    "entry": {"question": "6", "answer": "2 × 3", "metadata": {"number": 6}},
}

# kind: its section, and ground truths of the forms that it takes.
KINDS: dict[str, tuple[dict, list[object]]] = {
    "number": ({}, [3, -0.5, "#### 1,234", "$3"]),
    "exact": ({}, ["3", "Paris", 12]),
    "reasoning_gym": ({"extract": "last_line"}, [SUM, FACTORS]),
    "math": ({}, [3, "\\frac{1}{2}", "x+1"]),
    "sentiment": ({}, [None]),
    "length": ({"min_words": 2, "max_words": 5}, [None]),
    "weighted": (
        {
            "terms": [
                {"weight": 1.0, "reward": {"kind": "number"}},
                {"weight": 0.1, "reward": {"kind": "sentiment"}},
                {"weight": -0.3, "reward": {"kind": "length", "max_words": 3}},
            ]
        },
        [3, "#### 1,234"],
    ),
    # `outside` fills in the rest of these three: it makes a model, a server and a module.
    "model": ({}, [None]),
    "judge": ({}, [None, 3]),
    "python": ({}, [None, 3, {"a": [1]}]),
}

#: Kinds whose scores may differ in the last digits with the batch that a row is in.
CLOSE = {"model": reordered(2_000, condition=4)}

SCORER = """
def score(batch, weight):
    lengths = [len(row.completion) for row in batch]
    return [(None, "too long to read") if n > 50_000 else weight * n for n in lengths]
"""


class _Judge(BaseHTTPRequestHandler):
    """Writes the last digit of the length of what it was asked; of long texts it says nothing of use."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        text = "long" if len(asked) > 3000 else str(len(asked) % 10)
        top = [{"token": text, "logprob": math.log(0.8)}, {"token": "5", "logprob": math.log(0.1)}]
        tokens = [{"token": text, "logprob": math.log(0.8), "top_logprobs": top}]
        choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": tokens}}
        reply = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # four threads of 16 requests each connect at once


@pytest.fixture(scope="module", autouse=True)
def outside(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tiny classifier, a judge on loopback and a module with a function, for the kinds that need one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("outside")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / "model")
    shape = LlamaConfig.from_pretrained(tiny_model, num_labels=1, architectures=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(shape).save_pretrained(folder / "model")
    (folder / "contract_scorer.py").write_text(SCORER)
    sys.path.insert(0, str(folder))
    server = _Server(("127.0.0.1", 0), _Judge)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    model = {"path": str(folder / "model"), "dtype": "float32", "batch_tokens": 512}
    url = f"http://127.0.0.1:{server.server_port}/v1"
    sections = {
        "model": model,
        "judge": {"url": url, "model": "j", "template": "{{ completion }}", "lowest": 0, "retry_seconds": 0},
        "python": {"function": "contract_scorer:score", "arguments": {"weight": 0.5}, "batch_size": 5},
    }
    for kind, section in sections.items():
        KINDS[kind][0][kind] = section
    yield
    for kind in sections:
        reward(kind).close()
    sys.path.remove(str(folder))
    server.shutdown()
    server.server_close()
    thread.join()


NASTY = [
    "",
    " \n\t",
    "...!?",
    "3",
    "-3",
    "\u22123",
    "\uff13",
    "The answer is 3.",
    "3, not 4",
    "1,234.50",
    "4 - 1 = 3",
    "3kg",
    "\\boxed{3}",
    "$\\frac{1}{2}$",
    "<answer>3</answer>",
    "2 × 3",
    "x × y",
    "Great! I love it, but not the end.",
    "NaN inf 1e999 -Infinity",
    "\x00\ud800\u202e{}[]\\",
    '{"value": 1}\n{"error": "x"}',
    "9" * 5000,
    "word " * 20_000,
    "1" * 100_000,
]


@lru_cache
def reward(kind: str) -> Reward:
    """One reward a kind for the whole suite: the scoring processes start once."""
    return make_reward(config(kind))


def config(kind: str) -> RewardConfig:
    return RewardConfig(kind=kind, **KINDS[kind][0])


def request(text: str, ground_truth: object, row: int = 0) -> RewardRequest:
    encoded = None if ground_truth is None else json.dumps(ground_truth)
    return RewardRequest(f"prompt-{row}", row, (("user", "?"),), text, encoded)


def rows(kind: str) -> list[RewardRequest]:
    ground_truths = KINDS[kind][1]
    return [request(text, ground_truths[i % len(ground_truths)], i) for i, text in enumerate(NASTY)]


def same(kind: str, found: Sequence[Score], wanted: Sequence[Score]) -> bool:
    """Equal scores: to the last digit, or to the kind's tolerance."""
    if kind not in CLOSE:
        return list(found) == list(wanted)
    assert [(s.status, s.detail) for s in found] == [(s.status, s.detail) for s in wanted]
    assert [s.reward for s in found] == pytest.approx([s.reward for s in wanted], abs=CLOSE[kind])
    return True


def in_a_thread(kind: str, requests: Sequence[RewardRequest]) -> list[Score]:
    found: list[Score] = []
    thread = threading.Thread(target=lambda: found.extend(reward(kind).score(requests)))
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nasty_completions_get_a_score_or_a_reason(kind: str) -> None:
    scores = reward(kind).score(rows(kind))
    assert len(scores) == len(NASTY)
    for score in scores:
        assert score.status in STATUSES
        if score.status == "ok":
            assert type(score.reward) is float
            assert math.isfinite(score.reward)
            assert score.detail == "" or score.detail.startswith("the scorer raised ")
        else:
            assert score.reward is None
            assert score.detail
            assert "\n" not in score.detail
            assert len(score.detail) <= 400
    assert scores[0].status == "ok"  # an empty completion is a completion


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_score_depends_on_its_row_alone(kind: str, data: st.DataObject) -> None:
    # Not on batch, order, thread, or what was scored before.
    texts = st.one_of(st.sampled_from(NASTY[:-3]), st.text(max_size=30))
    drawn = data.draw(st.lists(st.tuples(texts, st.sampled_from(KINDS[kind][1])), min_size=1, max_size=6))
    requests = [request(text, ground_truth, row) for row, (text, ground_truth) in enumerate(drawn)]
    together = reward(kind).score(requests)
    order = data.draw(st.permutations(range(len(requests))))
    shuffled = reward(kind).score([requests[place] for place in order])
    assert same(kind, [shuffled[order.index(place)] for place in range(len(requests))], together)
    assert same(kind, [reward(kind).score([single])[0] for single in requests], together)
    assert same(kind, in_a_thread(kind, requests), together)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_score_at_the_same_time_do_not_mix(kind: str) -> None:
    requests = rows(kind)
    expected = reward(kind).score(requests)
    found: dict[int, list[Score]] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: reward(kind).score(requests)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(kind, found[n], expected) for n in range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_reward_of_the_same_section_gives_the_same_scores(kind: str) -> None:
    made = make_reward(config(kind))
    assert same(kind, made.score(rows(kind)), reward(kind).score(rows(kind)))
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_reward_can_be_used_again(kind: str) -> None:
    made = make_reward(config(kind))
    made.close()
    first = made.score(rows(kind)[:3])
    made.close()
    assert same(kind, made.score(rows(kind)[:3]), first)
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_progress_is_called_for_every_row(kind: str) -> None:
    calls: list[int] = []
    reward(kind).score(rows(kind), calls.append)
    assert sum(calls) == len(NASTY)
    assert all(call > 0 for call in calls)
    assert len(calls) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_no_scores(kind: str) -> None:
    calls: list[int] = []
    assert reward(kind).score([], calls.append) == []
    assert calls == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_ground_truth_is_refused_before_anything_is_scored(kind: str) -> None:
    calls: list[int] = []
    present = request("3", KINDS[kind][1][0], 0)
    missing = request("3", None, 1)
    if not make_reward(config(kind)).needs_ground_truth:
        assert [score.status for score in reward(kind).score([present, missing])] == ["ok", "ok"]
        assert check_ground_truths(config(kind), [("prompt-1", None)]) == []
        return
    with pytest.raises(DataError) as caught:
        reward(kind).score([present, missing], calls.append)
    assert calls == []
    assert caught.value.where == "prompt prompt-1"
    assert "no ground truth" in caught.value.message
    assert caught.value.remedy
    with pytest.raises(DataError, match="no ground truth"):
        refuse(make_reward(config(kind)), [("prompt-1", None)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_unusable_ground_truth_is_told_with_its_row(kind: str) -> None:
    good = request("", KINDS[kind][1][0]).ground_truth
    problems = check_ground_truths(config(kind), [("a", None), ("b", good), ("c", None), ("d", good)])
    if not make_reward(config(kind)).needs_ground_truth:
        assert problems == []
        return
    assert [(each.row, each.prompt_id) for each in problems] == [(0, "a"), (2, "c")]
    assert all("no ground truth" in each.problem and each.remedy for each in problems)
    with pytest.raises(DataError, match=r"no ground truth.*and 1 more.*prompt a"):
        refuse(make_reward(config(kind)), [("a", None), ("b", good), ("c", None)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ground_truths_of_this_suite_pass_the_check(kind: str) -> None:
    ground_truths = [(str(row), request("", value).ground_truth) for row, value in enumerate(KINDS[kind][1])]
    made = reward(kind)
    assert isinstance(made.needs_ground_truth, bool)  # type: ignore[attr-defined]
    checked: Reward = made  # type: ignore[assignment]
    assert checked.problems(ground_truths) == []
