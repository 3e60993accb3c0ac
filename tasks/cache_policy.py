"""The cache policy of stages that make one artifact: Prefect's record is valid only with the artifact.

The task's result record is ``_prefect.json`` in the artifact's folder, next to ``manifest.json``, so deleting
the folder deletes both. The record holds the manifest's digest. The store decides:

- record and matching manifest: the run shows "Cached" and does not call the function;
- manifest only (made without Prefect, or the record could not be written): the function finds the artifact in
  the store and returns at once, and Prefect writes the record;
- record only, or with another manifest: the function is called and the record is replaced.

Prefect silently treats every error in reading a record as "no record". Here the error is a warning, and the
function then raises the store's error or finds the artifact. An error in writing a record is a warning as
well: the next run finds the artifact itself.

A result is small plain JSON: a reference, never data. Prefect's records can name code that decodes them, so a
planted record could run any code. Only records of exactly our form reach Prefect.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.filesystems import WritableFileSystem
from prefect.logging import get_logger, get_run_logger
from prefect.serializers import JSONSerializer

from qrpo_core.common.errors import DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import digest_bytes
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects

RECORD = "_prefect.json"
MANIFEST = "manifest.json"

P = ParamSpec("P")
R = TypeVar("R")

_SERIALIZER = JSONSerializer().model_dump(mode="json")


def artifact_task(
    fn: Callable[P, R], store: StoreConfig, *, name: str | None = None, **options: Any
) -> Task[P, R]:
    """A task that makes an artifact and keeps its result record in the store.

    Parameters
    ----------
    fn : makes the artifact of its parameter `recipe` (anything with a relative `path`) in the store, or finds
        it there, and returns a small JSON value. Its other parameters are not part of the key and need not be
        hashable; one that Prefect should not walk through is passed as `quote(value)`.
    store : the store that `fn` works on.
    name : the task's name in the UI, by default the function's.
    options : more of `prefect.Task`'s parameters, such as `task_run_name` or `retries`. Prefect refuses
        `with_options` on the returned task.
    """
    bound = Task(
        fn=fn,
        name=name,
        cache_policy=ArtifactPolicy(),
        persist_result=True,
        result_serializer="json",
        cache_result_in_memory=False,
        **options,
    )
    # As a parameter, Task accepts only a block saved on the server, so that other processes can fetch the
    # result. None does, and the store's address stays out of Prefect's database.
    bound.result_storage = ArtifactRecords(store=store)
    return bound


@dataclass
class ArtifactPolicy(CachePolicy):
    """The key is the artifact's own path, from the task's parameter `recipe`."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """`<recipe.path>/_prefect.json`. Prefect logs an error raised here and runs the task uncached."""
        path = inputs["recipe"].path
        parts = path.split("/")
        if not all(parts) or ".." in parts or "." in parts or ":" in path:
            raise StoreError(f"not a relative path: {path!r}", remedy="write artifacts/step/key")
        return f"{path}/{RECORD}"


class ArtifactRecords(WritableFileSystem):
    """Prefect's result storage over a store: records beside artifacts, read and written whole."""

    _block_type_name = "QRPO artifact records"

    store: StoreConfig

    @cached_property
    def _objects(self) -> Objects:
        return open_objects(self.store)

    def _resolve_path(self, path: str) -> None:
        """None: records hold no absolute path, so that a store can be moved."""

    def read_path(self, path: str, **_: Any) -> bytes:  # type: ignore[override]
        """The record at `path`. Prefect runs the task on any error; errors other than absence are logged."""
        try:
            manifest = self._objects.read(_manifest_of(path))
            record = self._objects.read(path)
            _check(record, digest_bytes(manifest), f"{self._objects.url}/{path}")
        except MissingError:
            raise
        except Exception as error:
            _log().warning("Not using a cached result: %s", error)
            raise
        return record

    def write_path(self, path: str, content: bytes, **_: Any) -> None:  # type: ignore[override]
        """Write the record beside the artifact that its task committed."""
        if not path.endswith(f"/{RECORD}"):
            return  # a failed task's exception, under a random key; the log has it
        try:
            manifest = digest_bytes(self._objects.read(_manifest_of(path)))
            record = json.dumps({**json.loads(content), "manifest": manifest}).encode()
            _check(record, manifest, f"{self._objects.url}/{path}")
            self._objects.write(path, record)
        except Exception as error:  # if raised, Prefect would show a finished task as rolled back
            _log().warning("The next run will not show this as cached: %s", error)


def _manifest_of(path: str) -> str:
    return path.removesuffix(RECORD) + MANIFEST


def _check(content: bytes, manifest: str, where: str) -> None:
    """Refuse a record that we did not write, or that belongs to another manifest."""
    try:
        record = json.loads(content)
        json.loads(record["result"], object_hook=_plain)
        ours = record["metadata"]["serializer"] == _SERIALIZER
    except (ValueError, KeyError, TypeError) as error:
        remedy = "delete it; it is written again"
        raise DamagedError(f"not a record of ours ({error!r})", where=where, remedy=remedy) from None
    if not ours:
        raise DamagedError("a record with another serializer", where=where, remedy="find out who wrote it")
    if record.get("manifest") != manifest:
        raise MissingError("the record belongs to an earlier artifact at this place", where=where)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse the tags with which Prefect imports a class to rebuild a value."""
    if "__class__" in value or "__exc_type__" in value:
        raise StoreError("a result that is not plain JSON", remedy="return text, numbers, lists or dicts")
    return value


def _log() -> Any:
    """The task run's logger; ours outside a task run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("qrpo")
