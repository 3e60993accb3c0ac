"""The scoring process: what it keeps away, what ends it, and that the next row finds another."""

import gc
import json
import os
import time
from collections.abc import Iterator

import pytest

from qrpo_core.config import RewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.registry import make_reward
from qrpo_core.rewards.verifiable.scorer_main import MEMORY_BYTES
from qrpo_core.rewards.verifiable.scorer_process import Worker


def entry(task: str, answer: str, **metadata: object) -> str:
    return json.dumps(
        {"task": task, "parameters": {}, "entry": {"question": "?", "answer": answer, "metadata": metadata}}
    )


COUNTDOWN = entry("countdown", "1 + 2", numbers=[1, 2], target=3)


def test_a_process_that_ends_costs_one_row() -> None:
    reward = make_reward(RewardConfig(kind="reasoning_gym", extract="whole"))
    # This scorer evaluates the answer as Python: a completion can end the process that scores it.
    texts = ["1 + 2", "__import__('os')._exit(3)", "2 + 1"]
    rows = [RewardRequest("p", row, (), text, COUNTDOWN) for row, text in enumerate(texts)]
    assert reward.score(rows) == [
        Score(1.0),
        Score(None, "parse_error", "the scoring process ended with status 3"),
        Score(1.0),
    ]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield Worker("reasoning_gym")


def test_the_process_does_not_see_this_ones_environment(worker: Worker) -> None:
    read = "[__import__('os').environ.get('AWS_SECRET_ACCESS_KEY', 'absent')]"
    # string_insertion gives 0.1 for an expression that evaluates to the answer.
    assert worker.score(entry("string_insertion", "absent"), read) == 0.1
    assert worker.score(entry("string_insertion", "secret"), read) == 0


def test_what_a_scorer_prints_or_reads_is_not_the_conversation_with_it(worker: Worker) -> None:
    assert worker.score(entry("string_insertion", "x"), "input()") == 0
    assert worker.score(entry("string_insertion", "x"), 'print(\'{"value": 1}\') or "x"') == 0.1


def test_the_process_ends_with_its_owner() -> None:
    worker = Worker("math")
    assert worker.score("5", "$5$") == 1
    process = worker._process
    assert process is not None
    del worker
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_memory_is_limited(worker: Worker) -> None:
    ground_truth = entry("string_insertion", "x")
    assert worker.score(ground_truth, "'x' if bytes(1 << 20) else ''") == 0.1
    assert worker.score(ground_truth, f"'x' if bytes({MEMORY_BYTES}) else ''") == 0  # MemoryError, swallowed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ground_truth", "text"),
    [
        ("reasoning_gym", COUNTDOWN, "9**9**9**9"),
        ("math", "5", "$\\boxed{10^{10^{10}}}$"),
        # Half a minute of waiting.
        pytest.param("reasoning_gym", COUNTDOWN, "__import__('time').sleep(1000)", marks=pytest.mark.long),
    ],
)
def test_an_endless_computation_is_a_timeout(kind: str, ground_truth: str, text: str) -> None:
    reward = make_reward(RewardConfig(kind=kind))
    started = time.monotonic()
    (score,) = reward.score([RewardRequest("p", 0, (), text, ground_truth)])
    assert (score.reward, score.status) == (None, "timeout")
    assert "5 s of processor time or 30 s" in score.detail
    assert time.monotonic() - started < 200
