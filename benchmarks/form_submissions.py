"""What a browser is told while many submit at once on SQLite: 50 form submissions, 8 at a time.

    python benchmarks/form_submissions.py [--output benchmarks/results/form_submissions.json]

A submission is the request that the form of Prefect's UI sends: one POST without any retry, with the whole
demo as parameters. `form` sends it to the server of `make serve`; `form, plain server` to `prefect server
start`; `client` starts the run by `qrpo submit`'s function on ours. Both servers have a fresh
SQLite database and their default settings. Meanwhile another thread writes as runs do: it creates flow runs
and sets their states through the client. An error is an answer that is not 2xx: the UI shows it. `runs`
counts what the server has afterwards, so that a submission that was repeated and done twice would be seen.
Goal: no error with `form`, and as many runs as submissions.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from _result import ROOT, about, options, publish

from flows.service.deploy import create_pools
from flows.service.submissions import client_of, submit
from qrpo_core.config.reading import load_experiment

THREADS = 8
#: Seconds between the runs that are recorded meanwhile.
PAUSE = 0.5
DEMO = {"experiment": load_experiment(ROOT / "experiments/demo.yaml").model_dump(mode="json")}
OURS = [sys.executable, "-m", "flows.service.serve"]
PLAIN = [sys.executable, "-m", "prefect", "server", "start"]


@contextmanager
def served(command: list[str]) -> Iterator[str]:
    """A server with a database of its own; the URL of its API."""
    with tempfile.TemporaryDirectory() as home, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        url = f"http://127.0.0.1:{port}/api"
        environment = {
            **os.environ,
            "PREFECT_HOME": home,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        environment.pop("PREFECT_API_URL", None)
        with (Path(home) / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    if httpx.get(f"{url}/health").is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def deployment(url: str) -> str:
    """Put a deployment `align` on the server, as `make deploy` does; its id."""
    create_pools(url)
    with client_of(url) as client:
        flow = client.create_flow_from_name("align")
        return str(client.create_deployment(flow, "align", work_pool_name="gpu", parameters=DEMO))


@contextmanager
def recording(url: str) -> Iterator[list[int]]:
    """A thread that writes as runs do until the block ends; how many runs it recorded."""
    from prefect import flow
    from prefect.states import Completed, Running

    @flow(name="beside")
    def beside() -> None: ...

    stop, count = threading.Event(), [0]

    def write() -> None:
        with client_of(url) as client:
            while not stop.is_set():
                run = client.create_flow_run(beside)
                for state in (Running(), Completed()):
                    client.set_flow_run_state(run.id, state)
                count[0] += 1
                stop.wait(PAUSE)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def by_form(url: str, deployed: str) -> Callable[[int], str]:
    """A function that sends what the UI's form sends; it returns the status."""

    def send(number: int) -> str:
        place = f"{url}/deployments/{deployed}/create_flow_run"
        body = {"parameters": DEMO, "name": f"form {number}", "state": {"type": "SCHEDULED"}}
        return str(httpx.post(place, json=body, timeout=120).status_code)

    return send


def by_client(url: str, deployed: str) -> Callable[[int], str]:
    """A function that submits as `qrpo submit` does; it returns 201 or the error."""

    def send(number: int) -> str:
        try:
            submit(url, "align", DEMO, f"form {number}")
        except Exception as error:
            return str(error)
        return "201"

    return send


def measure(command: list[str], way: Callable[..., Callable[[int], str]], submissions: int) -> dict[str, Any]:
    """Submit on a fresh server, 8 at a time, while another thread records runs."""
    with served(command) as url:
        deployed = deployment(url)
        send, seconds = way(url, deployed), []

        def timed(number: int) -> str:
            started = time.perf_counter()
            answer = send(number)
            seconds.append(time.perf_counter() - started)
            return answer

        with recording(url) as recorded, ThreadPoolExecutor(THREADS) as threads:
            answers = Counter(threads.map(timed, range(submissions)))
        with client_of(url) as client:
            wanted = {"deployments": {"id": {"any_": [deployed]}}}
            runs = client.request("POST", "/flow_runs/count", json=wanted).json()
    return {
        "answers": dict(answers),
        "errors": submissions - answers["201"],
        "runs": runs,
        "recorded_meanwhile": recorded[0],
        "seconds_median": round(statistics.median(seconds), 2),
        "seconds_largest": round(max(seconds), 2),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--submissions", type=int, default=50)
    parser.add_argument("--only", nargs="+", help="the ways to measure (default: all)")
    arguments = parser.parse_args()
    result = about("form_submissions", goals={"form": {"errors": 0, "runs": arguments.submissions}})
    result |= {"submissions": arguments.submissions, "at_a_time": THREADS}
    ways = {"form": (OURS, by_form), "form, plain server": (PLAIN, by_form), "client": (OURS, by_client)}
    for name, (command, way) in ways.items():
        if arguments.only is not None and name not in arguments.only:
            continue
        print(name, file=sys.stderr, flush=True)
        result[name] = measure(command, way, arguments.submissions)
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
