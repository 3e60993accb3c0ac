"""One suite for both back ends: a directory, and a real S3 server. What only one of them has stands below."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qrpo_core.common.errors import AccessError, MissingError, StoreError
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends import s3
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.local import LocalObjects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.backends.s3 import S3Objects


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest part that S3 takes, so that a file of some megabytes has several."""
    monkeypatch.setattr(s3, "PART", 5 << 20)
    return 5 << 20


def large_file(path: Path, size: int) -> Path:
    """Bytes that differ from part to part."""
    path.write_bytes(b"".join(number.to_bytes(4, "big") * 256 for number in range(size // 1024)) + b"end")
    return path


class TestObjects:
    def test_what_is_written_is_read(self, objects: Objects) -> None:
        objects.write("a/b", b"one")
        objects.write("a/b", b"two")
        assert objects.read("a/b") == b"two"
        objects.write("a/empty", b"")
        assert objects.read("a/empty") == b""

    def test_absent_is_missing_everywhere(self, objects: Objects, tmp_path: Path) -> None:
        with pytest.raises(MissingError):
            objects.read("no/such")
        with pytest.raises(MissingError):
            objects.download("no/such", tmp_path / "x")
        assert not objects.exists("no/such")
        assert list(objects.keys("no/")) == []
        assert list(objects.entries("no")) == []
        objects.delete("no/such")

    def test_free_bytes_are_those_of_a_disk_or_none(self, objects: Objects) -> None:
        objects.write("a/b", b"one")
        free = objects.free_bytes()
        if isinstance(objects, LocalObjects):
            assert free is not None
            assert 0 < free <= shutil.disk_usage(objects.root).total
        else:
            assert free is None

    def test_create_succeeds_once_and_keeps_the_first(self, objects: Objects) -> None:
        assert objects.put_if_absent("c", b"first")
        assert not objects.put_if_absent("c", b"second")
        assert not objects.put_if_absent("c", b"first")
        assert objects.read("c") == b"first"

    def test_of_16_racing_creators_one_wins(self, objects: Objects) -> None:
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i: objects.put_if_absent("race", str(i).encode()), range(16)))
        assert sum(won) == 1
        assert objects.read("race") == str(won.index(True)).encode()

    def test_entries_are_those_below_the_folder_sorted(self, objects: Objects) -> None:
        before = datetime.now(UTC) - timedelta(seconds=5)  # an S3 time has whole seconds
        for key in ("x/2", "x/1/deep", "x/1-", "xy/3", "x/10"):
            objects.write(key, key.encode())
        found = list(objects.entries("x"))
        assert [entry.key for entry in found] == sorted(["x/2", "x/1/deep", "x/1-", "x/10"])
        assert [entry.size for entry in found] == [len(entry.key) for entry in found]
        assert all(before < entry.modified < datetime.now(UTC) + timedelta(seconds=5) for entry in found)
        assert list(objects.entries("x/")) == found
        assert list(objects.keys("x")) == [entry.key for entry in found]
        assert len(list(objects.entries(""))) == 5

    @pytest.mark.slow
    def test_more_keys_than_a_page_of_s3(self, objects: Objects) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: objects.write(f"many/{i:04}", b""), range(1003)))
        assert list(objects.keys("many")) == [f"many/{i:04}" for i in range(1003)]

    def test_upload_and_download_keep_the_bytes(self, objects: Objects, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(range(256)) * 1000)
        objects.upload(source, "big")
        objects.download("big", target)
        assert target.read_bytes() == source.read_bytes()

    @pytest.mark.usefixtures("small_parts")
    def test_a_large_file(self, objects: Objects, tmp_path: Path) -> None:
        one, two = large_file(tmp_path / "one", 12 << 20), large_file(tmp_path / "two", 11 << 20)
        objects.upload(one, "file")
        objects.download("file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == one.read_bytes()
        objects.upload(two, "file")
        assert objects.read("file") == two.read_bytes()
        assert list(objects.keys("probe")) == list(objects.keys("tmp")) == []

    def test_a_file_that_is_not_there_is_no_missing_object(self, objects: Objects, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="cannot read the file") as error:
            objects.upload(tmp_path / "no", "key")
        assert not isinstance(error.value, MissingError)

    def test_delete_removes(self, objects: Objects) -> None:
        objects.write("d", b"x")
        objects.delete("d")
        assert not objects.exists("d")

    def test_the_probe_is_content_and_leaves_nothing(self, objects: Objects) -> None:
        objects.check_conditional()
        assert list(objects.keys("")) == []


class TestLocal:
    def test_nothing_is_made_before_the_first_write(self, local_store: StoreConfig) -> None:
        objects = open_objects(local_store)
        assert list(objects.keys("")) == []
        assert not objects.exists("x")
        assert not Path(local_store.path).exists()

    def test_names_are_synced_after_the_content(
        self, local_store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        real = os.fsync

        def spy(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            synced.append(str(path).removeprefix(local_store.path) if path.is_dir() else "content")
            real(handle)

        monkeypatch.setattr(os, "fsync", spy)
        (tmp_path / "file").write_bytes(b"x")
        objects = LocalObjects(Path(local_store.path))
        objects.write("a/b/c", b"x")
        # The store and its tmp/, the content, the folders above the object, and the object's name.
        assert synced == ["", str(tmp_path), "content", "/a", "", "/a/b"]
        for put in (
            lambda: objects.put_if_absent("a/b/d", b"x"),
            lambda: objects.upload(tmp_path / "file", "a/b/e"),
        ):
            synced.clear()
            put()
            assert synced == ["content", "/a/b"]

    def test_a_file_size_limit_is_a_full_disk(self, local_store: StoreConfig, tmp_path: Path) -> None:
        script = tmp_path / "script.py"
        script.write_text(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536,) * 2)\n{FULL}")
        subprocess.run([sys.executable, str(script), local_store.path], check=True, capture_output=True)

    def test_a_full_disk(self, tmp_path: Path) -> None:
        (tmp_path / "script.py").write_text(FULL)
        (tmp_path / "disk").mkdir()
        in_namespace(
            f"mount -t tmpfs -o size=256k tmpfs {tmp_path}/disk",
            f"{sys.executable} {tmp_path}/script.py {tmp_path}/disk/store",
        )

    def test_a_read_only_file_system(self, tmp_path: Path) -> None:
        store = tmp_path / "store"
        LocalObjects(store).write("kept", b"kept")
        (tmp_path / "script.py").write_text(READ_ONLY)
        in_namespace(
            f"mount --bind {store} {store}",
            f"mount -o remount,bind,ro {store}",
            f"{sys.executable} {tmp_path}/script.py {store}",
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_closed_directory_is_not_absence(self, local_store: StoreConfig) -> None:
        objects = open_objects(local_store)
        objects.write("a/b", b"x")
        (Path(local_store.path) / "a").chmod(0)
        try:
            with pytest.raises(AccessError):
                objects.read("a/b")
            with pytest.raises(AccessError):
                list(objects.keys("a"))
        finally:
            (Path(local_store.path) / "a").chmod(0o700)

    def test_a_file_system_without_hard_links_is_refused(
        self, local_store: StoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(StoreError, match="hard links") as error:
            open_objects(local_store).check_conditional()
        assert not isinstance(error.value, AccessError)


class TestS3:
    @pytest.mark.slow
    def test_wrong_credentials_are_not_absence(
        self, s3_store: StoreConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        objects = S3Objects(s3_store)
        for call in (
            lambda: objects.exists("x"),
            lambda: objects.read("x"),
            lambda: objects.put_if_absent("x", b""),
            lambda: list(objects.keys("x")),
            objects.check_conditional,
        ):
            with pytest.raises(AccessError, match=r"SignatureDoesNotMatch|AccessDenied|Forbidden|403"):
                call()

    @pytest.mark.slow
    def test_no_credentials_are_said(
        self, s3_store: StoreConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(AccessError, match="credentials"):
            S3Objects(s3_store).read("x")

    def test_no_server_is_a_store_error(self, aws_keys: None) -> None:
        config = StoreConfig(
            path="s3://bucket/x", endpoint_url="http://127.0.0.1:1", path_style=True, retry_seconds=0.5
        )
        with pytest.raises(StoreError, match=r"store\.endpoint_url") as error:
            S3Objects(config).read("x")
        assert not isinstance(error.value, MissingError | AccessError)

    def test_the_client_is_not_shared_with_a_forked_process(self, aws_keys: None) -> None:
        objects = S3Objects(StoreConfig(path="s3://bucket/x", endpoint_url="http://127.0.0.1:1"))
        mine = objects.client
        assert objects.client is mine
        objects._process = -1  # what a fork looks like from inside
        assert objects.client is not mine


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreError, match="'gs'"):
        open_objects(StoreConfig(path="gs://bucket"))


def test_a_path_without_a_bucket_is_refused() -> None:
    with pytest.raises(StoreError, match="no bucket"):
        open_objects(StoreConfig(path="s3://"))


#: Writes what does not fit: the error is ours and names the path, no part stays, and nothing is lost.
FULL = """
import sys
from pathlib import Path
from qrpo_core.common.errors import AccessError, StoreError
from qrpo_core.store.backends.local import LocalObjects
objects = LocalObjects(Path(sys.argv[1]))
small, large = b"s" * 5000, b"l" * 1000000
assert objects.put_if_absent("kept", small)
for put in (lambda: objects.write("kept", large), lambda: objects.put_if_absent("new", large)):
    try:
        put()
    except StoreError as error:
        assert "disk is full" in str(error) and sys.argv[1] in str(error), error
        assert not isinstance(error, AccessError)
    else:
        raise AssertionError("written")
assert objects.read("kept") == small
assert list(objects.keys("")) == ["kept"], list(objects.keys(""))
assert objects.put_if_absent("new", small)
"""

READ_ONLY = """
import sys
from pathlib import Path
from qrpo_core.common.errors import AccessError, StoreError
from qrpo_core.store.backends.local import LocalObjects
objects = LocalObjects(Path(sys.argv[1]))
for put in (objects.write, objects.put_if_absent):
    try:
        put("new", b"x")
    except StoreError as error:
        assert "read-only" in str(error) and sys.argv[1] in str(error), error
        assert not isinstance(error, AccessError)
    else:
        raise AssertionError("written")
assert objects.read("kept") == b"kept"
"""


def in_namespace(*commands: str) -> None:
    """Run commands with mounts of their own, as root of a user namespace; skipped where that is forbidden."""
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None:
        pytest.skip("mounting is not possible here: no unshare")
    allowed = subprocess.run([*shell, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"mounting is not possible here: {allowed.stderr.decode().strip()}")
    done = subprocess.run([*shell, " && ".join(commands)], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
