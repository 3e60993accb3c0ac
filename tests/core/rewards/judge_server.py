"""An OpenAI-compatible judge on loopback: a real HTTP server, whose answers a test decides."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qrpo_core.config.judge_rewards import JudgeRewardConfig
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.judge.reward import JudgeReward

#: Status, headers, and what the body says (JSON, or a text as it is). Status 0 hangs up.
Reply = tuple[int, dict[str, str], Any]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # else connections are refused when many come at once


class Judge:
    """A server on loopback whose answers a test decides; it keeps what it was asked.

    answer : from the body of a request and its number, the reply.
    asked : time (monotonic), path, headers and body of each request.
    most : requests that were there at once.
    url : the base of the API.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.asked: list[tuple[float, str, dict[str, str], dict[str, Any]]] = []
        self.most, self._now, lock, judge = 0, 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # header and body in one packet

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    judge._now += 1
                    judge.most = max(judge.most, judge._now)
                    judge.asked.append((time.monotonic(), self.path, dict(self.headers), body))
                    turn = len(judge.asked)
                status, headers, reply = answer(body, turn)
                with lock:
                    judge._now -= 1
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                content = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator[Judge]:
        """The server, while it answers."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def said(text: Any, finish: str = "stop", tokens: list[dict[str, Any]] | None = None, **more: Any) -> Reply:
    """A chat completion. text : or None, or parts; tokens : its log-probs; more : of the message."""
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}
    return 200, {}, {"choices": [choice | ({"logprobs": {"content": tokens}} if tokens else {})]}


TEMPLATE = "Question: {{ prompt }}\nAnswer: {{ completion }}\nScore {{ lowest }} to {{ highest }}:"
TOKENS = [
    {
        "token": "4",
        "logprob": math.log(0.5),
        "top_logprobs": [{"token": name, "logprob": math.log(0.5)} for name in ("4", "5")],
    }
]


def judge(url: str = "http://127.0.0.1:9/v1", **settings: Any) -> JudgeReward:
    given = {"model": "j", "template": TEMPLATE, "expected": False, "retry_seconds": 0, **settings}
    return JudgeReward(JudgeRewardConfig(url=url, **given))


def row(text: str, index: int = 0, ground_truth: str | None = None) -> RewardRequest:
    return RewardRequest(f"p{index}", index, (("system", "S"), ("user", "Q?")), text, ground_truth)


def completion(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"]).split("Answer: ")[1].split("\n")[0]
