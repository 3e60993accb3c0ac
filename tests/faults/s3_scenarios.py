"""Faults between a run and an S3 server, each on whole runs; a proxy injects them."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable
from dataclasses import replace

from tests.faults.accounts import Outcome
from tests.faults.driver import DONE, REFUSED
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.scenarios import Ground, one_line
from tests.faults.scene import Scene

#: Faults that pass by themselves, and what the table calls them. A run does not notice any of them.
PASSING: dict[str, Fault] = {
    "503 SlowDown": Fault("slow_down", share=0.1, times=math.inf),
    "no answer until the time-out": Fault("silence", share=0.05, times=4),
    "a request that is cut off": Fault("cut_request", method="PUT", share=0.15, times=math.inf, after=60),
    "an answer that is reset in its body": Fault(
        "cut_answer", method="GET", share=0.1, times=math.inf, after=40
    ),
    "an answer that ends early": Fault("short_answer", method="GET", share=0.1, times=math.inf, after=40),
    "a put whose answer is lost": Fault("lost_answer", method="PUT", share=0.2, times=math.inf),
}


def passing(ground: Ground, endpoint: str, what: str, seed: int) -> Outcome:
    """A run during which requests meet a fault at random; it ends as if nothing had been."""
    fault = replace(PASSING[what])
    with FaultProxy(endpoint, seed) as proxy:
        scene = ground.scene(proxy.url)
        proxy.inject(fault)
        # A call that is never answered is given up after a third of this.
        status = scene.run(seed=seed, retry_seconds=3.0 if fault.kind == "silence" else 20.0)
        assert status == DONE, scene.runs[-1].printed
        return scene.outcome(what, proxy.injected[fault.kind], 4)


def refused(ground: Ground, endpoint: str, seed: int, method: str = "", rounds: int = 3) -> Outcome:
    """403 for a while, in the middle of every stage: one line and status 2, nothing is taken for absent.

    method : of the requests that are refused; any by default.
    """
    with FaultProxy(endpoint, seed) as proxy:
        scene = ground.scene(proxy.url)
        _stopped(scene, proxy, Fault("forbidden", method=method, times=math.inf), "not allowed", rounds)
        proxy.clear()
        what = f"403 for a while{', to reads alone' if method == 'GET' else ''}"
        return scene.close(what, proxy.injected["forbidden"])


def overloaded(ground: Ground, endpoint: str, seed: int, rounds: int = 3) -> Outcome:
    """503 for longer than a call tries: one line and status 2."""
    with FaultProxy(endpoint, seed) as proxy:
        scene = ground.scene(proxy.url)
        _stopped(scene, proxy, Fault("slow_down", times=math.inf), "503", rounds)
        proxy.clear()
        return scene.close("503 for longer than store.retry_seconds", proxy.injected["slow_down"])


def _stopped(scene: Scene, proxy: FaultProxy, fault: Fault, says: str, rounds: int) -> None:
    """Runs that meet the fault in one stage after the other, and one more each while it lasts."""
    for stage in ("sample", "reward", "logprob")[:rounds]:
        proxy.clear()
        run = scene.start(retry_seconds=0.5)
        run.reaches(stage)
        proxy.inject(replace(fault))
        status = run.wait()
        assert status == REFUSED, (status, run.printed)
        one_line(run, says)
        scene.look()
        bought = scene.journal.bought()
        status = scene.run(retry_seconds=0.5)
        assert status == REFUSED, (status, scene.runs[-1].printed)
        one_line(scene.runs[-1], says)
        assert scene.journal.bought() == bought, "rows were bought by a run that could not read the store"


def lagging(ground: Ground, endpoint: str, seconds: float, kills: int, seed: int) -> Outcome:
    """Every listing is `seconds` old, in runs that are killed and started again at once."""
    rng = random.Random(seed)
    with FaultProxy(endpoint, seed) as proxy:
        scene = ground.scene(proxy.url)
        proxy.inject(Fault("old_listing", times=math.inf, seconds=seconds))
        for number in range(kills):
            stage = ("sample", "reward", "logprob")[number % 3]
            run = scene.start(seed=rng.randrange(1 << 30), death=(stage, "", rng.randint(10, 30)))
            assert run.wait() in (DONE, -signal.SIGKILL), run.printed
            scene.look()
        age = "the first ones" if seconds == math.inf else f"{seconds:g} s old"
        return scene.close(f"listings that lag ({age})", proxy.injected["old_listing"])


#: For the benchmark: every scenario with its usual measure.
ALL: dict[str, Callable[[Ground, str, int], Outcome]] = {
    **{what: (lambda ground, url, seed, what=what: passing(ground, url, what, seed)) for what in PASSING},
    "403": lambda ground, url, seed: refused(ground, url, seed),
    "403 to reads": lambda ground, url, seed: refused(ground, url, seed, "GET"),
    "503 for long": lambda ground, url, seed: overloaded(ground, url, seed),
    "lag": lambda ground, url, seed: lagging(ground, url, 1.0, 3, seed),
    "endless lag": lambda ground, url, seed: lagging(ground, url, math.inf, 3, seed),
}
