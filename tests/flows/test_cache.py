"""Coarse tasks against a real Prefect server: when the record beside an artifact is served, and when not."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import temporary_settings
from prefect.utilities.annotations import quote

from flows.service.server import prefect_server
from qrpo_core.common.errors import AccessError
from qrpo_core.common.hashing import digest_bytes
from qrpo_core.config import StoreConfig
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.recipe import Recipe
from tasks.cache_policy import ArtifactPolicy, ArtifactRecords, artifact_task
from tests.prefect_home import prefect_home

pytestmark = pytest.mark.slow

RECIPE = Recipe("step", 1, {"a": 1})
RECORD = f"{RECIPE.path}/_prefect.json"
MANIFEST = f"{RECIPE.path}/manifest.json"


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server of the module's own, whatever the machine has configured."""
    home = prefect_home(tmp_path_factory.mktemp("prefect"))
    settings: Any = {"api.url": None, "results.local_storage_path": home / "storage"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(home))
        with temporary_settings(settings), prefect_server():
            yield


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server in this process, with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ACCESS_KEY_ID": "the-key", "SECRET_ACCESS_KEY": "the-secret"}.items():
            patch.setenv(f"AWS_{name}", value)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="bucket")
        yield url
        server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StoreConfig:
    if request.param == "local":
        return StoreConfig(path=str(tmp_path / "store"))
    url = request.getfixturevalue("s3")
    return StoreConfig(
        path=f"s3://bucket/{tmp_path.name}", endpoint_url=url, region="us-east-1", path_style=True
    )


@pytest.fixture
def local(tmp_path: Path) -> StoreConfig:
    return StoreConfig(path=str(tmp_path / "store"))


class Stage:
    """A stage as the flows use it; counts how often its function was called and how often it computed."""

    def __init__(self, store: StoreConfig, result: Any = None) -> None:
        self.store, self.result = store, result
        self.called = self.computed = 0

    def run(self, recipe: Recipe = RECIPE, **options: Any) -> Any:
        """One flow run with one coarse task; returns the task's state, raises what the function raised."""
        # A lock cannot be hashed or pickled; what is not in the key need not be.
        arguments: dict[str, Any] = {"recipe": recipe, "store": self.store, "build": quote(self.build)}
        lock = threading.Lock()

        def stage(recipe: Recipe, store: StoreConfig, build: Callable[[Recipe], None], more: Any) -> Any:
            self.called += 1
            build(recipe)
            return recipe.path if self.result is None else self.result

        states = []

        @flow(name="stages")
        def stages() -> None:
            bound = artifact_task(stage, self.store, name="a stage", **options)
            states.append(bound(**arguments, more=quote(lock), return_state=True))
            states[0].result()

        stages()
        return states[0]

    def build(self, recipe: Recipe) -> None:
        artifacts = ArtifactStore(open_objects(self.store))
        if artifacts.find(recipe) is None:
            self.computed += 1
            artifacts.commit(recipe, {"data": b"data"}, {"number": self.computed}, 0.0)

    @property
    def objects(self) -> Objects:
        return open_objects(self.store)


def test_the_second_run_is_cached(store: StoreConfig) -> None:
    stage = Stage(store)
    states = [stage.run(task_run_name="the first stage") for _ in range(3)]
    assert [state.name for state in states] == ["Completed", "Cached", "Cached"]
    assert [state.result() for state in states] == [RECIPE.path] * 3
    assert (stage.called, stage.computed) == (1, 1)
    assert stage.run(Recipe("step", 2)).name == "Completed"


def test_the_record_says_nothing_of_the_store(store: StoreConfig) -> None:
    stage = Stage(store)
    stage.run()
    record = stage.objects.read(RECORD).decode()
    assert json.loads(record)["metadata"]["storage_key"] == RECORD  # relative: a store can be moved
    for secret in (store.path, store.endpoint_url, os.environ.get("AWS_SECRET_ACCESS_KEY"), "the-key"):
        assert secret is None or secret not in record
    with get_client(sync_client=True) as client:
        blocks = client.request("POST", "/block_documents/filter", json={}).json()
    assert blocks == []


@pytest.mark.parametrize("version", ["3.8.8", "3.9.1"])
def test_keys_are_ours_in_any_version_of_prefect(version: str, local: StoreConfig) -> None:
    """The key of a result is its path in the store, and a record that either version has written is served.

    The record is what both wrote, word for word but for their own number.
    """
    stage = Stage(local)
    stage.build(RECIPE)
    place = "artifacts/step/98d230f14e3c5df68e099209208baf0c"
    record = {
        "metadata": {
            "storage_key": f"{place}/_prefect.json",
            "expiration": None,
            "serializer": {
                "type": "json",
                "jsonlib": "json",
                "object_encoder": "prefect.serializers.prefect_json_object_encoder",
                "object_decoder": "prefect.serializers.prefect_json_object_decoder",
                "dumps_kwargs": {},
                "loads_kwargs": {},
            },
            "prefect_version": version,
            "storage_block_id": None,
        },
        "result": f'"{place}"',
    }
    manifest = digest_bytes(stage.objects.read(f"{place}/manifest.json"))
    stage.objects.write(f"{place}/_prefect.json", json.dumps({**record, "manifest": manifest}).encode())
    assert stage.run().name == "Cached"
    assert stage.called == 0
    stage.objects.delete(f"{place}/_prefect.json")
    stage.run()
    written = json.loads(stage.objects.read(f"{place}/_prefect.json"))
    written["metadata"]["prefect_version"] = version
    assert written == {**record, "manifest": manifest}


def test_without_its_artifact_a_record_is_not_served(store: StoreConfig) -> None:
    stage = Stage(store)
    stage.run()
    stage.objects.delete(MANIFEST)
    assert stage.run().name == "Completed"
    assert stage.computed == 2
    assert stage.run().name == "Cached"


def test_beside_another_artifact_a_record_is_not_served(local: StoreConfig) -> None:
    stage = Stage(local)
    stage.run()
    stage.objects.delete(MANIFEST)
    stage.build(RECIPE)  # without Prefect
    assert stage.run().name == "Completed"
    assert (stage.called, stage.computed) == (2, 2)
    assert stage.run().name == "Cached"


def test_an_artifact_without_a_record_is_found_by_the_function(local: StoreConfig) -> None:
    stage = Stage(local)
    stage.build(RECIPE)
    assert stage.run().name == "Completed"
    assert (stage.called, stage.computed) == (1, 1)
    assert stage.run().name == "Cached"


@pytest.mark.parametrize(
    "planted",
    [
        "not JSON",
        "{}",
        '{"metadata": {"serializer": {"type": "pickle", "picklelib": "cloudpickle"}}, "result": "0"}',
        '{"metadata": {"serializer": {"type": "json", "object_decoder": "os.system"}}, "result": "{}"}',
    ],
    ids=["garbage", "empty", "pickle", "decoder"],
)
def test_a_record_not_of_ours_is_refused_and_told(
    planted: str, local: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(local)
    stage.run()
    stage.objects.write(RECORD, planted.encode())
    with caplog.at_level(logging.WARNING, "prefect.task_runs"):
        assert stage.run().name == "Completed"
    assert "Not using a cached result" in caplog.text
    assert RECORD in caplog.text
    assert stage.run().name == "Cached"


def test_a_record_that_rebuilds_objects_is_refused(local: StoreConfig) -> None:
    stage = Stage(local)
    stage.run()
    record = json.loads(stage.objects.read(RECORD))
    record["result"] = json.dumps({"__class__": "antigravity.fly", "data": 1})
    stage.objects.write(RECORD, json.dumps(record).encode())
    assert stage.run().name == "Completed"


def test_a_read_error_is_told_and_the_task_meets_it_too(
    local: StoreConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(local)
    stage.run()

    def refused(self: Any, key: str) -> bytes:
        raise AccessError("not allowed", where=key)

    with caplog.at_level(logging.WARNING, "prefect.task_runs"), monkeypatch.context() as patch:
        patch.setattr("qrpo_core.store.backends.opening.LocalObjects.read", refused)
        with pytest.raises(AccessError):
            stage.run()
    assert "Not using a cached result: not allowed" in caplog.text
    assert stage.computed == 1
    assert stage.run().name == "Cached"


def test_a_result_that_is_not_plain_json_is_not_kept(
    local: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(local, result=StoreConfig())
    with caplog.at_level(logging.WARNING, "prefect.task_runs"):
        assert stage.run().result() == StoreConfig()
    assert "The next run will not show this as cached: a result that is not plain JSON" in caplog.text
    plain = Stage(local, result={"rows": 3, "parts": ["a", None]})
    assert plain.run().name == "Completed"
    assert plain.run().result() == plain.result
    assert plain.called == 1


def test_a_failed_task_leaves_nothing(local: StoreConfig) -> None:
    stage = Stage(local)
    stage.build = None  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError):
        stage.run()
    assert list(stage.objects.keys("")) == []


def test_nothing_runs_under_a_path_that_leaves_the_store() -> None:
    class Outside:
        path = "artifacts/../../step"

    with pytest.raises(Exception, match="not a relative path"):
        ArtifactPolicy().compute_key(None, {"recipe": Outside}, {})  # type: ignore[arg-type]


def test_a_hit_is_cheap(local: StoreConfig) -> None:
    records = ArtifactRecords(store=local)
    Stage(local).run()
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        records.read_path(RECORD)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.01
