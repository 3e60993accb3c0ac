"""The pages of a service's server: reports from the store, read-only, and nothing else."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.service.pages import STORES, stores, with_pages
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends.local import LocalObjects
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe
from tasks.page_links import page_address

PAGE = b"<!doctype html><p>a report</p>"


@pytest.fixture
def report(tmp_path: Path) -> Manifest:
    """A report in the store `tmp_path/store`, beside a file that nobody may read."""
    (tmp_path / "secret.txt").write_text("secret")
    artifacts = ArtifactStore(LocalObjects(tmp_path / "store"))
    inputs = {"train": "0" * 32, "evaluate": "1" * 32}
    return artifacts.commit(Recipe("report", 1, {"name": "small"}, inputs), {"report.html": PAGE}, {}, 0.0)


def client(store: Path, password: str | None = None) -> TestClient:
    app = with_pages(PlainTextResponse("Prefect's own"), [str(store / "none"), str(store)], password)
    return TestClient(app, raise_server_exceptions=True, follow_redirects=False)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_report_is_served_as_it_is_and_can_run_nothing(report: Manifest, tmp_path: Path) -> None:
    answer = client(tmp_path / "store").get(page_address(report))
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none';")
    assert "script" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client(tmp_path / "store").head(page_address(report)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/qrpo/report/../../../secret.txt",
        "/qrpo/report/..%2f..%2f..%2fsecret.txt",
        "/qrpo/report/%2e%2e/%2e%2e/secret.txt",
        "/qrpo/..%2fsecret.txt/{key}",
        "/qrpo/report/{key}/manifest.json",
        "/qrpo/report/{key}%00",
        "/qrpo/report/{key}%0a",
        "/qrpo/report/{upper}",
        "/qrpo/report//etc/passwd",
        "/qrpo/report/",
        "/qrpo/report",
        "/qrpo/train/{key}",
        "/qrpo/compare/{key}",
        "/qrpo/report/0123456789abcdef0123456789abcdef",
        "/qrpo",
        "/qrpo/",
    ],
)
def test_nothing_else_is_served(report: Manifest, tmp_path: Path, path: str) -> None:
    address = path.format(key=report.key, upper=report.key.upper())
    asked = client(tmp_path / "store")
    # The path as it is, since a client tidies `..` up before it asks.
    answer = asked.request("GET", "http://testserver/", extensions={"target": address.encode()})
    for each in (answer, asked.get(address)):
        assert b"secret" not in each.content.replace(b"secret.txt", b"")
        assert each.status_code in (404, 307) or each.text == "Prefect's own", each.text


def test_the_target_of_a_request_reaches_the_guard(report: Manifest, tmp_path: Path) -> None:
    """The address is taken apart by the guard itself: what a server hands over is one decoded path."""
    scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "query_string": b""}
    for path in (
        "/qrpo/report/../../../secret.txt",
        "/qrpo/../secret.txt",
        f"/qrpo/report/{report.key}/../x",
    ):
        assert sent(scope | {"path": path, "raw_path": path.encode()}, tmp_path) == 404
    good = page_address(report)
    assert sent(scope | {"path": good, "raw_path": good.encode()}, tmp_path) == 200


def sent(scope: dict[str, Any], folder: Path) -> int:
    import asyncio

    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    app = with_pages(PlainTextResponse("Prefect's own"), [str(folder / "store")])
    asyncio.run(app(scope, receive, send))
    return statuses[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_it_reads_only(report: Manifest, tmp_path: Path, method: str) -> None:
    before = files(tmp_path)
    for path in (page_address(report), "/qrpo/runs"):
        assert client(tmp_path / "store").request(method, path).status_code == 405
    assert client(tmp_path / "store").get("/qrpo/runs").status_code == 200
    assert files(tmp_path) == before
    assert not (tmp_path / "store" / "none").exists()


def test_a_page_that_is_not_the_committed_one_is_not_shown(report: Manifest, tmp_path: Path) -> None:
    page = tmp_path / "store" / report.path("report.html")
    page.chmod(0o644)
    page.write_bytes(PAGE.replace(b"report", b"change"))
    answer = client(tmp_path / "store").get(page_address(report))
    assert answer.status_code == 500
    assert b"change" not in answer.content
    page.unlink()
    page.symlink_to(tmp_path / "secret.txt")
    assert b"secret" not in client(tmp_path / "store").get(page_address(report)).content
    # A manifest that names a file outside its folder
    where = tmp_path / "store" / report.manifest_key
    where.chmod(0o644)
    where.write_text(where.read_text().replace(report.folder, "../../../.."))
    assert client(tmp_path / "store").get(page_address(report)).status_code == 500


def test_the_servers_password_guards_the_pages(report: Manifest, tmp_path: Path) -> None:
    asked = client(tmp_path / "store", "operator:secret word")
    right = base64.b64encode(b"operator:secret word").decode()
    wrong = base64.b64encode(b"operator:secret").decode()
    for header in (
        "",
        "Basic",
        f"Basic {wrong}",
        f"Bearer {right}",
        f"Basic {right[:-2]}",
        "Basic é",
        "Basic %",
    ):
        answer = asked.get(page_address(report), headers=[(b"authorization", header.encode())])
        assert answer.status_code == 401, header
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert PAGE not in answer.content
    assert asked.get(page_address(report), headers={"Authorization": f"Basic {right}"}).content == PAGE
    assert asked.get("/anything").text == "Prefect's own"  # which asks by itself


def test_what_is_not_below_its_own_address_is_prefects(report: Manifest, tmp_path: Path) -> None:
    for path in ("/", "/qrporeport", "/api/health", "/v2/qrpo/runs"):
        assert client(tmp_path / "store").get(path).text == "Prefect's own"


def test_the_runs_are_listed_with_names_as_text(tmp_path: Path) -> None:
    answer = client(tmp_path).get("/qrpo/runs")
    assert answer.text.count("No run.") == 2
    assert not re.search("<script", answer.text)
    odd = with_pages(PlainTextResponse("x"), [str(tmp_path / "<b>x</b>"), "gs://bucket"])
    text = TestClient(odd).get("/qrpo/runs").text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "unknown scheme" in text


def test_the_stores_are_those_that_the_operator_names() -> None:
    assert stores({}) == (".qrpo",)
    assert stores({STORES: "one  s3://two/three"}) == ("one", "s3://two/three")
