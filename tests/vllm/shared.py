"""What tests of vLLM share: whether it is there, a tiny model that it takes on the CPU, its server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.engines import VllmConfig
from qrpo_core.engines.vllm_process import environment
from qrpo_core.engines.vllm_setup import require
from tests.conftest import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("QRPO_VLLM_PYTHON") or str(ROOT / ".venv-vllm/bin/python")
CONFIG = VllmConfig(python=PYTHON, eager=True, startup_minutes=4)
#: As few as fit: the suite shares its cores and memory.
KV_CACHE_GIB = "1"


def skip_without_vllm() -> None:
    """Skip where there is no environment with vLLM."""
    try:
        require(CONFIG)
    except ConfigError as error:
        pytest.skip(f"{error} (QRPO_VLLM_PYTHON names another interpreter)")


def write_model(directory: Path) -> Path:
    """The tiny model with heads of 32, the narrowest of vLLM's on the CPU.

    Its generation_config asks for top_k 1 and a penalty: engines that heed it draw one and the same token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_model(directory)
    config = LlamaConfig.from_pretrained(directory)
    config.head_dim = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    settings = json.loads((directory / "generation_config.json").read_text())
    model.save_pretrained(directory)
    settings |= {"do_sample": True, "top_k": 1, "repetition_penalty": 1.5, "temperature": 0.3}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


@contextlib.contextmanager
def server(model: Path, *arguments: str) -> Iterator[str]:
    """The base URL of vLLM's OpenAI-compatible server of a model, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = model.with_name(f"server-{port}.log")
    command = [PYTHON, "-I", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--no-enable-chunked-prefill", *arguments]  # on the CPU it fails with seeded rows
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment([], 1), stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
