"""What a browser gets while the server's database is locked. The locks are real: two writers on SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from flows.service.locked_database import RepeatLocked

FAST = (0.01, 0.01, 0.01, 0.01)


def app(database: Path, seen: list[Any]) -> Starlette:
    """Writes each body into the database, or answers 503 and raises, as Prefect's server does."""

    async def write(request: Request) -> JSONResponse:
        seen.append(await request.json())
        with contextlib.closing(sqlite3.connect(database, timeout=0)) as connection, connection:
            connection.execute("INSERT INTO runs VALUES (?)", (seen[-1]["name"],))
        return JSONResponse({"id": request.path_params["id"]}, 201)

    async def locked(request: Request, error: Exception) -> JSONResponse:
        refused = isinstance(error, sqlite3.OperationalError)
        return JSONResponse({"exception_message": str(error)}, 503 if refused else 500)

    inner = Mount("/api", routes=[Route("/runs/{id}", write, methods=["POST"])])
    return Starlette(routes=[inner], exception_handlers={Exception: locked})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(tmp_path / "db")) as connection, connection:
        connection.execute("CREATE TABLE runs (name)")
    return tmp_path / "db"


def post(served: Any, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(served, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/api/runs/7", json=body)

    return asyncio.run(send())


def rows(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM runs")]


def test_a_request_waits_until_the_lock_is_gone_and_is_done_once(database: Path) -> None:
    seen: list[Any] = []
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")

        class Unlocking(list[Any]):
            def append(self, item: Any) -> None:
                seen.append(item)
                super().append(item)
                if len(self) == 3:
                    other.rollback()

        answer = post(RepeatLocked(app(database, Unlocking()), FAST), name="long " * 50_000)
    assert (answer.status_code, answer.json()) == (201, {"id": "7"})
    assert len(seen) == 3  # whole each time: a body that was read is there again
    assert all(each == seen[0] for each in seen)
    assert rows(database) == ["long " * 50_000]


def test_a_lock_that_stays_is_told_in_the_end(database: Path) -> None:
    seen: list[Any] = []
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        answer = post(RepeatLocked(app(database, seen), FAST), name="one")
    assert answer.status_code == 503
    assert "locked" in answer.json()["exception_message"]
    assert len(seen) == len(FAST) + 1
    assert rows(database) == []


@pytest.mark.parametrize(
    ("body", "status"), [({"name": "one"}, 201), ({"other": 1}, 500)], ids=["done", "another error"]
)
def test_what_is_not_locked_is_sent_once(
    database: Path, body: dict[str, Any], status: int, capsys: Callable[..., Any]
) -> None:
    seen: list[Any] = []
    assert post(RepeatLocked(app(database, seen), FAST), **body).status_code == status
    assert len(seen) == 1
