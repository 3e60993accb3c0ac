"""The back ends of the store and the engines that every contract is tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from tests.contracts.engine_cases import Case, case_of, endpoint_case, vllm_case
from tests.vllm import shared as vllm


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> StoreConfig:
    """An empty store: in a directory, and on a real S3 server."""
    config: StoreConfig = request.getfixturevalue(f"{request.param}_store")
    return config


@pytest.fixture
def objects(store: StoreConfig) -> Objects:
    """The store's back end."""
    return open_objects(store)


@pytest.fixture
def aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials in the environment, for servers that check none."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model for vLLM on the CPU, in an environment that lets it have little memory."""
    vllm.skip_without_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", vllm.KV_CACHE_GIB)
        yield vllm.write_model(tmp_path_factory.mktemp("vllm") / "model")


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
def case(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Case]:
    """An engine and what its tests need to know."""
    slow = {"vllm": vllm_case, "endpoint": endpoint_case}
    if request.param in slow:
        with slow[request.param](request.getfixturevalue("vllm_model")) as found:
            yield found
    else:
        yield case_of(request.param, tiny_model)
