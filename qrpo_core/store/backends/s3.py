"""The store in an S3 bucket. Credentials come from the environment or the AWS files.

Every request goes through one `Caller`, which retries temporary errors. botocore's own retries are off: they
know neither our time limit nor that a conditional put may have succeeded before its answer was lost.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import botocore.session
from botocore.config import Config

from qrpo_core.common.errors import MissingError, StoreError
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Entry, probe
from qrpo_core.store.backends.s3_errors import Caller, ExistsError, NoUploadError

T = TypeVar("T")

#: Objects up to twice this size take one request; larger ones go in parts of this size, in parallel. Bytes.
PART = 16 << 20
_PARTS_AT_ONCE = 8
_MOST_PARTS = 10_000  # S3's limit
_CONNECTIONS = 32


class S3Objects:
    """Objects in an S3 bucket."""

    def __init__(self, config: StoreConfig) -> None:
        self.bucket, _, prefix = config.path.removeprefix("s3://").strip("/").partition("/")
        self.url = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self.prefix = f"{prefix}/" if prefix else ""
        if not self.bucket:
            raise StoreError(f"store.path {config.path!r} names no bucket", remedy="write s3://bucket/prefix")
        self._config = config
        self._caller = Caller(config.retry_seconds)
        self._client, self._process = _client(config), os.getpid()

    @property
    def client(self) -> Any:
        """The botocore client; a forked process gets a new one, since connections must not be shared."""
        if self._process != os.getpid():
            self._client, self._process = _client(self._config), os.getpid()
        return self._client

    def read(self, key: str) -> bytes:
        return self._call(key, lambda _: self._get(key))

    def write(self, key: str, data: bytes) -> None:
        self._call(key, lambda _: self.client.put_object(**self._at(key), Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        attempts = 0

        def put(before: int) -> None:
            nonlocal attempts
            attempts = before + 1
            self.client.put_object(**self._at(key), Body=data, IfNoneMatch="*")

        try:
            self._call(key, put)
        except ExistsError:
            # If the answer to an earlier attempt was lost, the object may be ours.
            return attempts > 1 and self.read(key) == data
        return True

    def entries(self, prefix: str) -> Iterator[Entry]:
        found: list[Entry] = []
        folder = self.prefix + (f"{prefix.rstrip('/')}/" if prefix else "")
        page: dict[str, Any] = {"Bucket": self.bucket, "Prefix": folder}
        while True:
            answer = self._call(prefix, partial(self._list, page))
            for each in answer.get("Contents", ()):
                if not each["Key"].endswith("/"):  # a folder marker of some tools
                    key = each["Key"].removeprefix(self.prefix)
                    found.append(Entry(key, each["Size"], each["LastModified"]))
            if not answer.get("IsTruncated"):
                break
            page = {**page, "ContinuationToken": answer["NextContinuationToken"]}
        yield from sorted(found, key=lambda entry: entry.key)  # some servers sort otherwise

    def keys(self, prefix: str) -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except MissingError:
            return False
        return True

    def delete(self, key: str) -> None:
        self._call(key, lambda _: self.client.delete_object(**self._at(key)))

    def upload(self, source: Path, key: str, *, unchanging: bool = False) -> None:
        if _size(source) <= 2 * PART:
            self.write(key, source.read_bytes())
        else:
            self._multipart(source, key)

    def download(self, key: str, target: Path) -> None:
        head = self._head(key)
        size, same = head["ContentLength"], {"IfMatch": head["ETag"]}
        with target.open("wb") as file:
            file.truncate(size)

            def fetch(start: int) -> None:
                span = {} if size <= 2 * PART else {"Range": f"bytes={start}-{start + PART - 1}"}
                data = self._call(key, lambda _: self._get(key, **span, **same))
                os.pwrite(file.fileno(), data, start)

            try:
                _at_once(fetch, [0] if size <= 2 * PART else range(0, size, PART))
            except ExistsError:
                raise StoreError(
                    "the object was replaced while it was read", where=f"{self.url}/{key}", remedy="run again"
                ) from None

    def local(self, key: str) -> Path | None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def check_conditional(self) -> None:
        probe(self)

    def _multipart(self, source: Path, key: str) -> None:
        """Upload a file in parts."""
        size = _size(source)
        part = max(PART, -(-size // _MOST_PARTS))
        started = self._call(key, lambda _: self.client.create_multipart_upload(**self._at(key)))
        upload = {**self._at(key), "UploadId": started["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            data = _span(source, (number - 1) * part, part)
            answer = self._call(
                key, lambda _: self.client.upload_part(**upload, PartNumber=number, Body=data)
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            parts = {"Parts": _at_once(send, range(1, -(-size // part) + 1))}
            self._complete(source, key, {**upload, "MultipartUpload": parts})
        except BaseException:
            self._abort(upload)
            raise

    def _complete(self, source: Path, key: str, upload: dict[str, Any]) -> None:
        attempts = 0

        def complete(attempt: int) -> None:
            nonlocal attempts
            attempts = attempt + 1
            self.client.complete_multipart_upload(**upload)

        try:
            self._call(key, complete)
        except NoUploadError:
            # An earlier attempt whose answer was lost may have completed it.
            if not (attempts > 1 and self.exists(key) and self._same(source, key)):
                raise

    def _abort(self, upload: dict[str, Any]) -> None:
        """Delete the uploaded parts; if that fails, the bucket's lifecycle rule has to."""
        which = {name: upload[name] for name in ("Bucket", "Key", "UploadId")}
        try:
            self._call(upload["Key"], lambda _: self.client.abort_multipart_upload(**which))
        except StoreError:
            return

    def _same(self, source: Path, key: str) -> bool:
        """Whether the object has the file's content, compared by parts."""
        size = _size(source)
        if self._head(key)["ContentLength"] != size:
            return False

        def equal(start: int) -> bool:
            span = f"bytes={start}-{start + PART - 1}"
            return self._call(key, lambda _: self._get(key, Range=span)) == _span(source, start, PART)

        return all(_at_once(equal, range(0, size, PART)))

    def _list(self, page: dict[str, Any], _: int) -> Any:
        return self.client.list_objects_v2(**page)

    def _head(self, key: str) -> Any:
        return self._call(key, lambda _: self.client.head_object(**self._at(key)))

    def _get(self, key: str, **options: str) -> bytes:
        with closing(self.client.get_object(**self._at(key), **options)["Body"]) as body:
            data: bytes = body.read()  # checks the length that was announced
            return data

    def _call(self, key: str, call: Callable[[int], T]) -> T:
        return self._caller(call, f"{self.url}/{key}", self.bucket)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}


def _client(config: StoreConfig) -> Any:
    # Long enough for a slow server, short enough to retry a call without an answer in time.
    patience = max(1.0, min(20.0, config.retry_seconds / 3 or 20.0))
    session = botocore.session.get_session()  # with credentials as they are now
    session.register_component("data_loader", _loader())
    return session.create_client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=patience,
            read_timeout=patience,
            max_pool_connections=_CONNECTIONS,
            response_checksum_validation="when_required",  # we compare reads with our own digests
            s3={"addressing_style": "path" if config.path_style else "auto"},
        ),
    )


@cache
def _loader() -> Any:
    """botocore's description of S3, loaded once: loading it takes longest of all here."""
    return botocore.session.get_session().get_component("data_loader")


def _at_once(work: Callable[[int], T], places: Any) -> list[T]:
    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        return list(pool.map(work, places))


def _size(source: Path) -> int:
    try:
        return source.stat().st_size
    except OSError as error:
        raise StoreError(f"cannot read the file: {error.strerror}", where=str(source)) from error


def _span(source: Path, start: int, count: int) -> bytes:
    with source.open("rb") as file:
        file.seek(start)
        return file.read(count)
