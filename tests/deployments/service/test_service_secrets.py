"""A run with marked secrets in the environment; then everything that was written is searched for them."""

from __future__ import annotations

import base64
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import AUTH
from qrpo_core.config.reading import load_experiment
from tests.core.rewards.judge_server import Judge, Reply, said

MARK = secrets.token_hex(12)
SECRETS = {
    "AWS_ACCESS_KEY_ID": f"{MARK}access",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}storage",
    "OPENAI_API_KEY": f"{MARK}judge",
    "HF_TOKEN": f"{MARK}hub",
    AUTH: f"operator:{MARK}password",
}


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """A judge that takes the key alone; whoever asks for the score of a cat is told what it was sent."""

    def answer(body: dict[str, Any], turn: int) -> Reply:
        sent = judge.asked[turn - 1][2].get("authorization") or judge.asked[turn - 1][2]["Authorization"]
        assert sent == f"Bearer {SECRETS['OPENAI_API_KEY']}"
        if "cat" in str(body["messages"]):
            return 401, {}, {"error": {"message": f"{sent} may not do this, and {sent.split()[1]} neither"}}
        return said(str(1 + len(str(body)) % 9))

    judge = Judge(answer)
    with judge.running():
        yield judge


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder with its name, and what compression would hide of it."""
    import pyarrow.parquet as pq

    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        yield str(file), str(file).encode() + file.read_bytes()
        if file.suffix == ".parquet" or file.name == "rows":
            yield f"rows of {file}", str(pq.read_table(file).to_pylist()).encode()
        if file.suffix == ".db":
            with sqlite3.connect(file) as database:
                yield f"dump of {file}", "\n".join(database.iterdump()).encode()


def found(where: dict[str, bytes]) -> list[str]:
    """The places in which a secret stands, plainly or as HTTP sends a password."""
    password = base64.b64encode(SECRETS[AUTH].encode())
    return [name for name, text in where.items() if MARK.encode() in text or password in text]


@pytest.mark.service
def test_a_secret_of_the_environment_is_written_nowhere(
    make_service: Callable[..., Any], write_experiment: Callable[..., Path], tmp_path: Path, judge: Judge
) -> None:
    service = make_service(**SECRETS)
    service.auth = ("operator", f"{MARK}password")
    service.serve()
    service.run("flows.service.deploy")
    workers = service.start("flows.service.workers")
    asked = {"url": judge.url, "model": "judge", "template": "{{ completion }}", "expected": False}
    reward = {"kind": "judge", "judge": {**asked, "retry_seconds": 5.0}}
    training = {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3}
    whole = load_experiment(write_experiment("whole", reward=reward, training=training))
    refused = {"kind": "judge", "judge": {**reward["judge"], "template": "cat {{ completion }}"}}
    failing = load_experiment(write_experiment("failing", reward=refused))
    runs = {
        "COMPLETED": service.begin("align", whole.model_dump(mode="json")),
        "FAILED": service.begin("precompute", failing.model_dump(mode="json")),
    }
    ended = {state: service.end(run, 900) for state, run in runs.items()}
    printed = service.run("flows.cli", "report", str(tmp_path / "whole.yaml"))
    assert {state: end[0] for state, end in ended.items()} == {state: state for state in runs}, ended
    assert "may not do this" in ended["FAILED"][1]  # what the judge said, without the key
    assert judge.asked
    workers.terminate()
    workers.wait()

    kinds = ("flow_runs", "task_runs", "logs", "artifacts", "events", "deployments", "block_documents")
    answers = {kind: str(service.ask("POST", f"/{kind}/filter")).encode() for kind in kinds}
    assert b"sample references" in answers["logs"]
    service.server.terminate()
    service.server.wait()
    written = dict(contents(service.folder)) | dict(contents(tmp_path)) | answers
    written["printed"] = printed.encode()
    places = "\n".join(written)
    for expected in (
        r"prefect\.db",
        r"flows\.service\.workers\.log",
        r"store-whole/.*\.html",
        r"rows of .*store-whole",
    ):
        assert re.search(expected, places), expected  # the search looks where things are
    assert found(written) == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [secrets.token_hex(30) for _ in range(50)]
    pq.write_table(pa.table({"text": [MARK, *words]}), tmp_path / "a.parquet", compression="zstd")
    (tmp_path / "b").write_bytes(base64.b64encode(SECRETS[AUTH].encode()))
    (tmp_path / "c").write_text("nothing")
    with sqlite3.connect(tmp_path / "d.db") as database:
        database.execute("create table t as select ? as text", (MARK,))
    places = " ".join(found(dict(contents(tmp_path))))
    assert all(name in places for name in ("a.parquet", "/b", "d.db"))
    assert "/c" not in places
