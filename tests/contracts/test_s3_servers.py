"""Which S3 servers can hold a store: those on which a conditional put is refused the second time."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qrpo_core.common.errors import AccessError, MissingError, StoreError
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends import s3
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.backends.s3 import S3Objects

pytestmark = pytest.mark.usefixtures("aws_keys")
BUCKET = "bucket"


def store_at(url: str, path: str = f"s3://{BUCKET}/x") -> StoreConfig:
    return StoreConfig(path=path, endpoint_url=url, path_style=True, retry_seconds=5)


def make_bucket(url: str) -> None:
    """As soon as the server answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            S3Objects(store_at(url)).client.create_bucket(Bucket=BUCKET)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def nanio(tmp_path: Path) -> Iterator[str]:
    if importlib.util.find_spec("nanio") is None:
        pytest.skip("the package nanio is not installed: pip install --no-deps nanio aiofiles defusedxml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port)]
    keys = {"NANIO_ACCESS_KEY": "tester", "NANIO_SECRET_KEY": "not-a-secret"}
    server = subprocess.Popen(
        [*command, "--data-dir", str(tmp_path)],
        env=keys,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    make_bucket(url)
    yield url
    server.kill()
    server.wait()


class FakeServer(BaseHTTPRequestHandler):
    """A fake S3 server: objects in a dictionary; what it makes of If-None-Match is its class's affair."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    code = ""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.conditional() if "If-None-Match" in self.headers else 200
        if status == 200:
            self.objects[self.path] = body
        self.reply(status, f"<Error><Code>{self.code}</Code></Error>".encode() if status == 409 else b"")

    def do_GET(self) -> None:
        self.reply(200 if self.path in self.objects else 404, self.objects.get(self.path, b""))

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.reply(204)

    def conditional(self) -> int:
        """Status of a conditional put."""
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"") -> None:
        self.send_response_only(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Refuses501(FakeServer):
    def conditional(self) -> int:
        return 501


class Refuses400(FakeServer):
    def conditional(self) -> int:
        return 400


class AlwaysSaysNo(FakeServer):
    def conditional(self) -> int:
        return 412


class Conflicts(FakeServer):
    """As AWS may, when two conditional puts are under way at once: try again, it says."""

    code = "ConditionalRequestConflict"

    def conditional(self) -> int:
        self.objects["asked"] = self.objects.get("asked", b"") + b"."
        return 409 if len(self.objects["asked"]) < 3 else 200


class Ignores(FakeServer):
    def conditional(self) -> int:
        return 200


class ForgetsUploads(FakeServer):
    """The first completion of an upload is answered 500 and leaves `left_behind`; then the upload is gone."""

    left_behind: bytes | None

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        path, _, query = self.path.partition("?")
        if query == "uploads":
            return self.reply(200, b"<R><UploadId>u</UploadId></R>")
        if "complete" not in self.objects:
            self.objects["complete"] = b""
            if self.left_behind is not None:
                self.objects[path] = self.left_behind
            return self.reply(500)
        return self.reply(404, b"<Error><Code>NoSuchUpload</Code></Error>")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.objects.get(self.path)
        if body is None:
            return self.reply(404)
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            return self.reply(206, body[int(first) : int(last) + 1])
        return self.reply(200, body)


@pytest.fixture
def fake() -> Iterator[Callable[[type[FakeServer]], S3Objects]]:
    """Starts a fake server of a class; returns a store on it."""
    running: list[ThreadingHTTPServer] = []

    def start(kind: type[FakeServer]) -> S3Objects:
        kind.objects = {}
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        return S3Objects(store_at(f"http://127.0.0.1:{server.server_address[1]}"))

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_moto_passes(moto: str) -> None:
    make_bucket(moto)
    objects = open_objects(store_at(moto))
    objects.check_conditional()
    assert list(objects.keys("")) == []


@pytest.mark.parametrize("theirs", [None, b"somebody else's", "ours"])
def test_an_upload_that_is_gone_after_an_answer_was_lost(
    theirs: bytes | str | None,
    fake: Callable[[type[FakeServer]], S3Objects],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose object is there then is seen from its content."""
    monkeypatch.setattr(s3, "PART", 1000)
    source = tmp_path / "file"
    source.write_bytes(bytes(range(250)) * 10)
    objects = fake(ForgetsUploads)
    ForgetsUploads.left_behind = source.read_bytes() if theirs == "ours" else theirs
    if theirs == "ours":
        objects.upload(source, "file")
        assert objects.read("file") == source.read_bytes()
    else:
        with pytest.raises(StoreError, match="upload is gone") as error:
            objects.upload(source, "file")
        assert not isinstance(error.value, MissingError)


@pytest.mark.slow
def test_nanio_ignores_the_condition_and_is_refused(nanio: str, tmp_path: Path) -> None:
    objects = open_objects(store_at(nanio))
    with pytest.raises(StoreError, match="ignores conditional puts") as error:
        objects.check_conditional()
    assert "SeaweedFS" in str(error.value)
    assert f"{BUCKET}/x/probe/" in str(error.value)
    assert list(objects.keys("")) == []


def test_a_server_that_ignores_the_condition_is_refused(
    fake: Callable[[type[FakeServer]], S3Objects],
) -> None:
    with pytest.raises(StoreError, match="ignores conditional puts"):
        fake(Ignores).check_conditional()
    assert Ignores.objects == {}


@pytest.mark.parametrize(("kind", "status"), [(Refuses501, "501"), (Refuses400, "400")])
def test_a_server_that_refuses_the_condition_is_refused(
    kind: type[FakeServer], status: str, fake: Callable[[type[FakeServer]], S3Objects]
) -> None:
    with pytest.raises(StoreError, match=f"refuses conditional puts .*{status}") as error:
        fake(kind).check_conditional()
    assert "SeaweedFS" in str(error.value)
    assert kind.objects == {}


def test_a_conflict_of_conditional_puts_is_tried_again(
    fake: Callable[[type[FakeServer]], S3Objects],
) -> None:
    assert fake(Conflicts).put_if_absent("x", b"x")
    assert Conflicts.objects["asked"] == b"..."


def test_a_server_that_never_grants_the_condition_is_refused(
    fake: Callable[[type[FakeServer]], S3Objects],
) -> None:
    with pytest.raises(StoreError, match="of a new object was refused"):
        fake(AlwaysSaysNo).check_conditional()


def test_no_bucket_is_said(moto: str, tmp_path: Path) -> None:
    objects = open_objects(store_at(moto, "s3://no-such-bucket/x"))
    for call in (
        lambda: objects.write("x", b""),
        lambda: objects.put_if_absent("x", b""),
        lambda: objects.read("x"),
        lambda: list(objects.keys("x")),
        objects.check_conditional,
    ):
        with pytest.raises(StoreError, match="no bucket 'no-such-bucket'") as error:
            call()
        assert not isinstance(error.value, MissingError | AccessError)
