"""One run of the pre-computation in a process of its own, which notes what it buys and dies where it is told.

It is the flow `precompute` as it stands: its body, the stages of `tasks`, the steps and the store. Only
Prefect's engine is left out, which costs seconds a run: the functions inside its tasks are called directly.
The same through `qrpo run` is in test_command_line.py.

The journal has one line an event. ``begin`` stands there before a block's rows are computed, with the length
that the journal had when the store was last asked for them; ``commit`` once they are known to be in it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: Exit statuses are those of the command line.
DONE, REFUSED, INTERRUPTED = 0, 2, 130

#: The state of a task that ran without Prefect's engine.
FINISHED = SimpleNamespace(name="Completed", result=lambda: None)


@dataclass(frozen=True)
class Job:
    """One run.

    folder : of the journal and of what the run prints. run : its number there.
    environment : beside that of the fork server. seed : of the order of blocks, and of the clock.
    row_seconds : what a row pretends to take.
    death : (stage, point, n): SIGKILL itself when it passes the point for the n-th time in the stage; "" is
        any stage, any point.
    full : such a place after which no file can grow any more. jumping_clock : see `_jump`.
    gate : a file to wait for. until : a stage before which the run ends as if it were done.
    """

    experiment: dict[str, Any]
    folder: Path
    run: int
    environment: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    row_seconds: float = 0.002
    death: tuple[str, str, int] | None = None
    full: tuple[str, str, int] | None = None
    jumping_clock: bool = False
    gate: Path | None = None
    until: str = ""

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / f"{self.run}.state"

    @property
    def printed(self) -> Path:
        return self.folder / f"{self.run}.txt"


class Watch:
    """Keeps the journal, and knows where the run is: ``stage, point, points passed`` in the state file.

    Both are written straight to the kernel: a killed process takes none of it along.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stage = "start"
        self.passed: Counter[tuple[str, str]] = Counter()
        self.looked = 0
        self._journal = os.open(job.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._state = os.open(job.state, os.O_WRONLY | os.O_CREAT, 0o644)

    def note(self, did: str, **facts: Any) -> None:
        line = json.dumps({"run": self.job.run, "did": did, **facts}) + "\n"
        with growing():
            os.write(self._journal, line.encode())

    def at(self, point: str) -> None:
        """The run passes a point."""
        places = [(stage, name) for stage in ("", self.stage) for name in ("", point)]
        self.passed.update(places)
        passed = self.passed["", ""]
        with growing():
            os.pwrite(self._state, f"{self.stage},{point},{passed}".ljust(60).encode(), 0)
        here = [(*place, self.passed[place]) for place in places]
        if self.job.death in here:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.job.full in here:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def look(self) -> None:
        """The store is asked what is missing."""
        self.looked = os.fstat(self._journal).st_size

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        self.at(f"before {what}")
        yield
        self.at(f"after {what}")

    def row(self, rows: int) -> None:
        """Progress of a stage."""
        for _ in range(rows):
            time.sleep(self.job.row_seconds)
            self.at("row")


class WatchedObjects:
    """A back end whose writes are points."""

    def __init__(self, objects: Any, watch: Watch) -> None:
        self._objects, self._watch = objects, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def write(self, key: str, data: bytes) -> None:
        with self._watch.around("rows" if "/rows/" in key else "file"):
            self._objects.write(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._watch.around("manifest" if "/index/" in key else "create"):
            return bool(self._objects.put_if_absent(key, data))


class DirectBlock:
    """The task `compute_block` without the engine around it."""

    def __init__(self, function: Callable[..., Any], watch: Watch) -> None:
        self._function, self._watch = function, watch

    def __call__(
        self, title: str, step: Any, plan: Any, workspace: Any, advance: Callable[[int], None], **_: Any
    ) -> Any:
        step, plan, workspace = (each.unwrap() for each in (step, plan, workspace))
        rows = {"step": plan.recipe.step, "rows": list(plan.row_ids())}
        self._watch.stage = plan.recipe.step
        self._watch.at("begin")
        self._watch.note("begin", looked=self._watch.looked, **rows)
        self._function(title, step, plan, workspace, advance)
        self._watch.note("commit", **rows)
        return FINISHED


@contextmanager
def growing() -> Iterator[None]:
    """For our own notes there is room on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main(job: Job) -> None:
    """Target of the process: run, and exit as the command line does."""
    os.environ.update(job.environment)
    printed = os.open(job.printed, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    random.seed(job.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = Watch(job)
    status = DONE
    try:
        watch.at("start")
        _run(job, watch)
        watch.stage = "end"
        watch.at("end")
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        from qrpo_core.common.errors import QRPOError

        if not isinstance(error, QRPOError):
            raise
        status = REFUSED
        with growing():
            print(f"qrpo: {error}", file=sys.stderr, flush=True)
    sys.exit(status)


def _run(job: Job, watch: Watch) -> None:
    from flows import precompute
    from qrpo_core.config.reading import parse_experiment
    from qrpo_core.pipeline import workspace
    from qrpo_core.pipeline.preflight import check
    from qrpo_core.store.blocks.block_store import BlockStore
    from tasks import pipeline_run, prepare_prompts, row_stages
    from tasks.stages import Stage

    def artifact_stage(
        _: Any, name: str, recipe: Any, build: Callable[[], Any], inputs: Any = ()
    ) -> tuple[Stage, Any]:
        if name == job.until:
            sys.exit(DONE)
        watch.stage = name
        watch.at("begin")
        build()
        return Stage(name, 0, 1, "Completed", 0.0), FINISHED

    @contextmanager
    def progress(*_: Any) -> Iterator[Callable[[int], None]]:
        yield watch.row

    def still_missing(blocks: BlockStore, plan: Any) -> Any:
        watch.look()
        return asked(blocks, plan)

    opened, asked = workspace.open_objects, BlockStore.still_missing
    patches: list[tuple[Any, str, Any]] = [
        (workspace, "open_objects", lambda config: WatchedObjects(opened(config), watch)),
        (pipeline_run, "artifact_stage", artifact_stage),
        (pipeline_run, "publish_plan", lambda workspace: None),
        (pipeline_run, "publish_stages", lambda stages: None),
        (precompute, "emit_event", lambda *_: None),
        (row_stages, "artifact_stage", artifact_stage),
        (row_stages, "compute_block", DirectBlock(row_stages.compute_block.fn, watch)),
        (row_stages, "rows_complete", lambda *_, **__: FINISHED),
        (row_stages, "stage_progress", progress),
        (prepare_prompts, "stage_progress", lambda *_: nullcontext(lambda count: None)),
        (row_stages, "announce", lambda *_: None),
        (row_stages, "announce_problem", lambda text: watch.note("problem", text=text)),
        (BlockStore, "still_missing", still_missing),
        (os, "link", _linked(os.link, watch)),
    ]
    for owner, name, value in patches:  # of a process that does nothing else afterwards
        getattr(owner, name)
        setattr(owner, name, value)
    if job.jumping_clock:
        _jump(watch)
    experiment = parse_experiment(job.experiment)
    while job.gate is not None and not job.gate.exists():
        time.sleep(0.002)
    check(workspace.Workspace(experiment))
    precompute.precompute.fn(experiment)


def _linked(link: Callable[..., None], watch: Watch) -> Callable[..., None]:
    """The one step with which a local object becomes real."""

    def linked(source: Any, target: Any, **options: Any) -> None:
        with watch.around("link"):
            link(source, target, **options)

    return linked


def _jump(watch: Watch) -> None:
    """Let every look of our code at the calendar see another time, up to a year off, in either direction."""

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            watch.note("jump")
            return datetime.now(tz) + timedelta(days=random.uniform(-365, 365))

    for name, module in list(sys.modules.items()):
        if name.startswith(("qrpo_core.", "tasks.")) and getattr(module, "datetime", None) is datetime:
            setattr(module, "datetime", Jumping)  # noqa: B010 (mypy knows that a module has no such name)
