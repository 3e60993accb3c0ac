"""Programs written to pass without knowing the answer, to break out or to hang: none of them does."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qrpo_core.config.rewards import CodeRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.code.reward import CodeReward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]

#: `held_back.txt` was written against the fork server, after it.
FILES = ("programs.txt", "held_back.txt")
TEXTS = [Path(__file__, "..", "hostile", name).resolve().read_text() for name in FILES]
PARTS = [part.partition("\n") for text in TEXTS for part in text.split("\n### ")[1:]]
PROGRAMS = {name: source for name, _, source in PARTS}
#: Of a limit that stands in every sandbox's command line: which processes are this test's.
MEMORY_MB = 256 + os.getpid() % 509
SECONDS = 20.0


@dataclass
class Seen:
    scores: dict[str, Score]
    seconds: dict[str, float]
    connections: list[object]
    outside: list[str]


def left_over() -> list[str]:
    """Command lines of the sandboxes of this test that still run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes()
        except OSError:
            continue
        if f'"memory_bytes": {MEMORY_MB << 20}'.encode() in line:
            found.append(line.decode(errors="replace"))
    return found


def gone() -> list[str]:
    """What still runs after the time that the system needs to end a namespace."""
    for _ in range(100):
        if not left_over():
            return []
        time.sleep(0.05)
    return left_over()


@pytest.fixture(
    scope="module",
    params=[((), True), (("numpy",), True), ((), False)],
    ids=["library", "packages", "a_sandbox_a_program"],
)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    outside = tmp_path_factory.mktemp("outside")
    answer = secrets.randbelow(10**15) + 10**14
    (outside / "secret").write_text(str(answer))
    connections: list[object] = []
    servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    port = servers[0].getsockname()[1]
    servers[1].bind(f"\0qrpo-test-{port}")
    servers[1].listen()

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(connection.getsockname())
            connection.sendall(str(answer).encode())
            connection.close()

    for server in servers:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    filled = {
        "@OUTSIDE@": str(outside),
        "@PORT@": str(port),
        "@PARENT@": str(os.getpid()),
        "@NUL@": "\0",
        "@NESTED@": "(" * 100_000 + ")" * 100_000,
    }
    ground_truth = json.dumps(
        {"test_list": [f"assert solve(7) == {answer}", f"assert solve(8) == {answer + 1}"]}
    )
    packages, forks = request.param
    reward = CodeReward(
        CodeRewardConfig(
            format="mbpp",
            seconds_per_test=1.0,
            seconds_per_program=3.0,
            memory_mb=MEMORY_MB,
            processes=1,
            packages=packages,
        )
    )
    assert reward.problems([]) == []
    assert reward.mode is not None
    reward.mode = replace(reward.mode, forks=forks)

    def judge(name: str) -> tuple[Score, float]:
        source = PROGRAMS[name]
        for word, value in filled.items():
            source = source.replace(word, value)
        start = time.monotonic()
        row = RewardRequest(name, 0, (), f"```python\n{source}```\n", ground_truth)
        return reward.score([row])[0], time.monotonic() - start

    # Most of them do nothing until their time is over.
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setenv("QRPO_TEST_SECRET", str(answer))
        results = dict(zip(PROGRAMS, pool.map(judge, PROGRAMS), strict=True))
    yield Seen(
        {name: score for name, (score, _) in results.items()},
        {name: seconds for name, (_, seconds) in results.items()},
        connections,
        sorted(place.name for place in outside.iterdir()),
    )
    for server in servers:
        server.close()


def test_there_are_enough_of_them() -> None:
    assert len(PROGRAMS) == len(PARTS) >= 107 + 20


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_passes_nothing_and_ends(seen: Seen, name: str) -> None:
    score = seen.scores[name]
    assert (score.reward, score.status) in [(0.0, "ok"), (None, "timeout")], score
    assert seen.seconds[name] < SECONDS


def test_nothing_is_left_running(seen: Seen) -> None:
    assert gone() == []


def test_nothing_got_out(seen: Seen) -> None:
    assert seen.connections == []
    assert seen.outside == ["secret"]


def test_the_tests_can_be_passed(seen: Seen) -> None:
    # The same problem with the answer written down: what fails above fails for what it does.
    ground_truth = json.dumps({"test_list": ["assert solve(7) == 5"]})
    reward = CodeReward(CodeRewardConfig(format="mbpp", memory_mb=MEMORY_MB))
    row = RewardRequest("p", 0, (), "```python\ndef solve(n): return 5\n```", ground_truth)
    assert reward.score([row])[0].reward == 1.0
