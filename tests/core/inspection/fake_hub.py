"""A model hub on loopback, as far as huggingface_hub's own client uses one to upload a model.

It checks cards as the real hub says it does: the front matter is YAML, `license` and `base_model` are ids of
the hub, and `model-index` has tasks, data sets and metrics.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

TOKEN = "hf_test"
LICENSES = ("apache-2.0", "mit", "other")


class FakeHub:
    """What was sent: repositories with their visibility and files, and every path that was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []

    def problem(self, card: str) -> str:
        """Why the hub refuses a card; "" if it takes it."""
        _, front, _ = card.split("---\n", 2)
        data = yaml.safe_load(front)
        if data.get("license") not in LICENSES:
            return f'"license" must be one of {", ".join(LICENSES)}'
        base = data.get("base_model")
        if base is not None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) is None:
            return f'"base_model" with value "{base}" is not valid'
        name, found = model_index_to_eval_results(data["model-index"])
        return (
            "" if name and found and all(isinstance(each.metric_value, float) for each in found) else "index"
        )


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        """Nothing on standard error."""

    def _answer(self, status: int, value: Any = None) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status >= 400 and value:
            self.send_header("x-error-message", str(value.get("error", "")))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_GET(self) -> None:
        self.hub.asked.append(self.path)
        known = self.headers.get("authorization") == f"Bearer {TOKEN}"
        self._answer(200 if known else 401, {"name": "me"} if known else {"error": "Invalid token"})

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        path, body, hub = self.path.partition("?")[0], self._body(), self.hub
        hub.asked.append(path)
        if path == "/api/validate-yaml":
            problem = hub.problem(json.loads(body)["content"])
            problems = [{"message": problem}] if problem else []
            self._answer(400 if problem else 200, {"errors": problems, "warnings": [], "error": problem})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            private = asked.get("visibility") == "private" or bool(
                asked.get("private")
            )  # newer or older clients
            hub.private.setdefault(repo, private)
            self._answer(200, {"url": f"{hub.url}/{repo}"})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            self._answer(200, {"files": [_mode(each["path"]) for each in json.loads(body)["files"]]})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            actions = [
                each | {"actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}} for each in wanted
            ]
            self._answer(200, {"transfer": "basic", "objects": actions})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": f"no {path}"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.files.setdefault(repo, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = "0" * 40
        self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        )


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub on a free port of loopback."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
