"""The reward `judge` on the real thing: vLLM's own OpenAI server with the small model."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import EngineError
from qrpo_core.config.judge_rewards import JudgeRewardConfig
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.judge import answer
from qrpo_core.rewards.judge.reward import JudgeReward


def row(text: str, index: int = 0) -> RewardRequest:
    return RewardRequest(f"p{index}", index, (("user", "What is the capital of France?"),), text, None)


def vllm_python() -> str:
    found = os.environ.get("QRPO_VLLM_PYTHON") or str(
        Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"
    )
    if not Path(found).is_file():
        pytest.skip("no vLLM environment: make vllm-env, or set QRPO_VLLM_PYTHON")
    return found


@pytest.fixture(scope="module")
def vllm_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a real OpenAI server of vLLM with the small model."""
    import httpx

    python = vllm_python()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    preload = [
        str(Path(python).parents[1] / "lib" / "libiomp5.so"),
        "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    ]
    environment = {
        **os.environ,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(name for name in preload if Path(name).is_file()),
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2), "--enforce-eager"]
    command += ["--served-model-name", "judge", "--max-model-len", "512", "--max-logprobs", "20"]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        for _ in range(240):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx.TransportError:
                time.sleep(1)
            if server.poll() is not None:
                pytest.fail(f"vLLM ended: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, 15)
        server.wait(60)


TEMPLATE = (
    "How many stars from {{ lowest }} to {{ highest }} do you give to this answer: '{{ completion }}'? "
    "Write only the number."
)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_vllm_server_judges(vllm_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(**settings: Any) -> JudgeReward:
        section = {"model": "judge", "template": TEMPLATE, "highest": 5, "max_tokens": 48, **settings}
        return JudgeReward(JudgeRewardConfig(url=vllm_server, **section))

    requests = [row(text, i) for i, text in enumerate(["Paris", "I do not know", "Paris is in France."] * 2)]
    first = r"^\s*(\d)"  # the small model counts up to five
    written = judge(expected=False, pattern=first).score(requests)
    assert {score.status for score in written} <= {"ok", "parse_error"}
    assert any(score.reward in (1, 2, 3, 4, 5) for score in written), written
    # The small model begins most answers with a word: too little probability is on the scale, and said so.
    unsure = [
        score
        for score, plain in zip(judge(pattern=first).score(requests), written, strict=True)
        if plain.status == "ok"
    ]
    assert all("only probability 0." in score.detail for score in unsure if score.status != "ok"), unsure
    monkeypatch.setattr(answer, "LEAST_MASS", 0.01)
    scores = judge(pattern=first).score(requests)
    means = [score.reward for score in scores if score.reward is not None]
    assert means, scores
    assert all(1 < mean < 5 and mean != round(mean) for mean in means)
    (long,) = judge().score([row("word " * 2000)])
    assert long.status == "too_long"
    with pytest.raises(EngineError, match="404"):
        judge(model="nobody").score(requests[:1])
