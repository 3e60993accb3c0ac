"""The back ends that every contract of the store is tested on."""

from __future__ import annotations

import pytest

from qrpo_core.config import StoreConfig
from qrpo_core.store.objects import Objects, open_objects


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
