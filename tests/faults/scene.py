"""A store that things happen to: runs on it as processes, their journal, and the books closed at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from qrpo_core.common.schemas import TRAINING_SET
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.verify import verify
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from tests.faults import driver
from tests.faults.accounts import Journal, Outcome, Row, account, blocks_in, contents, rows_of, same, whole
from tests.faults.driver import DONE, Job

#: The longest that a run may take, seconds; a run that hangs fails its test.
PATIENCE = 300.0

_context = multiprocessing.get_context("forkserver")
_ROOT = Path(__file__).parents[2]


def settings(folder: Path, model: Path, prompts: int = 9) -> dict[str, Any]:
    """A small experiment whose samples come from the fake engine and log-probs from a real one. No store."""
    questions = folder / "questions.jsonl"
    lines = [json.dumps({"prompt": f"Say {n}", "answer": n}) + "\n" for n in range(prompts)]
    questions.write_text("".join(lines))
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "kind": "file",
            "path": str(questions),
            "ground_truth_field": "answer",
            "held_out": 0.3,
        },
        "sampling": {"engine": "fake", "references_per_prompt": 4, "max_new_tokens": 12},
        "reward": {"kind": "length", "max_words": 1},
        "training": {"precision": "fp32", "batch_size": 4},
    }


@dataclass
class Run:
    """A run that was started."""

    job: Job
    process: ForkServerProcess
    started: float

    def wait(self) -> int:
        """Its exit status; that of a killed one is minus the signal."""
        self.process.join(max(0.0, self.started + PATIENCE - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"run {self.job.run} hung at {self.place}: {self.printed}")
        return self.process.exitcode

    def reaches(self, stage: str) -> None:
        """Return when it is seen in a stage, or has ended."""
        while self.process.exitcode is None and self.place[0] != stage:
            time.sleep(0.001)

    @property
    def place(self) -> tuple[str, str]:
        """The stage and the point that it passed last."""
        text = self.job.state.read_text() if self.job.state.exists() else ""
        stage, point, _ = text.split(",") if text else ("", "", "")
        return stage, point

    @property
    def printed(self) -> str:
        return self.job.printed.read_text()


class Truth:
    """What undisturbed runs leave behind; made once for each number of references."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self._scenes: dict[int, Scene] = {}

    def scene(self, references: int) -> Scene:
        if references not in self._scenes:
            folder = self.folder / f"undisturbed-{references}"
            scene = Scene(
                folder, self.settings, StoreConfig(path=str(folder / "store"), rows_per_block=5), self
            )
            assert scene.run(references=references) == DONE, scene.runs[-1].printed
            assert account(scene.journal).twice == 0
            self._scenes[references] = scene
        return self._scenes[references]

    def rows(self, references: int) -> dict[Row, dict[str, Any]]:
        return dict(contents(self.scene(references).objects))

    def training_set(self, references: int) -> list[dict[str, Any]]:
        return self.scene(references).training_set(references)


class Scene:
    """One store and the runs on it.

    folder : of journal and run output. endpoint : where the runs find the server, if not where we do.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], store: StoreConfig, truth: Truth, endpoint: str = ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self.store, self.truth = folder, settings, store, truth
        self.endpoint = endpoint
        self.objects: Objects = open_objects(store)
        self.journal = Journal(folder / "journal.jsonl")
        self.runs: list[Run] = []
        self._hurt: dict[str, bytes] = {}

    @cached_property
    def back_end(self) -> str:
        return "S3" if self.store.path.startswith("s3://") else "directory"

    def experiment(self, references: int = 4, **store: Any) -> dict[str, Any]:
        sampling = {**self.settings["sampling"], "references_per_prompt": references}
        place = self.store.model_dump(mode="json") | store
        return {**self.settings, "sampling": sampling, "store": place}

    def start(self, references: int = 4, *, retry_seconds: float = 20.0, **job: Any) -> Run:
        """Start a run. job : fields of `Job`."""
        through = {"endpoint_url": self.endpoint} if self.endpoint else {}
        experiment = self.experiment(references, retry_seconds=retry_seconds, **through)
        environment = {
            name: value for name, value in os.environ.items() if name.startswith(("AWS_", "QRPO_"))
        }
        number = len(self.runs) + 1
        asked = Job(experiment, self.folder, number, environment, **{"seed": number, **job})
        _start_fork_server()
        process = _context.Process(target=driver.main, args=(asked,), daemon=True)
        process.start()
        self.runs.append(Run(asked, process, time.monotonic()))
        return self.runs[-1]

    def run(self, references: int = 4, **job: Any) -> int:
        """A run from start to end: its exit status."""
        status = self.start(references, **job).wait()
        self.look()
        return status

    def look(self) -> None:
        """Write down which rows are in the store now, while nobody writes, and which blocks are not whole."""
        for step, index, manifest in blocks_in(self.objects):
            if self._hurt.get(index) == self.objects.read(index):
                continue
            if whole(self.objects, manifest):
                self.journal.note("found", step=step, rows=rows_of(manifest))
            elif index not in self._hurt:
                self.journal.note("half", step=step, rows=rows_of(manifest))

    def hurt(
        self, block: tuple[str, str, dict[str, Any]], part: str, how: Callable[[Objects, str], None]
    ) -> None:
        """Damage a block of `blocks_in`: its "file" or its "index"; and write down that its rows are lost."""
        step, index, manifest = block
        how(self.objects, index if part == "index" else manifest["file"])
        self._hurt[index] = self.objects.read(index) if self.objects.exists(index) else b""
        self.journal.note("destroyed", step=step, rows=rows_of(manifest))

    def repair(self) -> int:
        """`qrpo verify --repair`: how many manifests it quarantined."""
        return len(verify(Workspace(self._parsed(4)), repair=True).quarantined)

    def training_set(self, references: int) -> list[dict[str, Any]]:
        workspace = Workspace(self._parsed(references))
        made = workspace.artifacts.get(stored_steps(workspace).first.training_set_recipe)
        table = workspace.load(made, "training_set.parquet", TRAINING_SET)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def close(self, fault: str, injected: int, references: int = 4, detail: str = "") -> Outcome:
        """Run until everything is there, and compare it with an undisturbed run."""
        for attempt in range(3):
            if self.run(references) == DONE:
                break
            assert attempt < 2, self.runs[-1].printed
        return self.outcome(fault, injected, references, detail=detail)

    def outcome(self, fault: str, injected: int, *budgets: int, detail: str = "") -> Outcome:
        """The books as they stand. budgets : references of the runs that are done, the largest first."""
        references = budgets[0]
        books, truth = account(self.journal), self.truth.rows(references)
        present = list(contents(self.objects))
        wrong = sum(row not in truth or not same(row[0], value, truth[row]) for row, value in present)
        wrong += sum(len(event["rows"]) for event in self.journal if event["did"] == "half")
        there = {row for row, _ in present}
        lost = len(books.committed - there)
        assert truth.keys() <= there, f"{len(truth.keys() - there)} rows are not there though the run is done"
        for budget in budgets:
            mine, right = self.training_set(budget), self.truth.training_set(budget)
            pairs = zip(mine, right, strict=True)
            wrong += sum(not same("training_set", one, other) for one, other in pairs)
        return Outcome(
            fault,
            self.back_end,
            injected,
            books.bought,
            lost,
            books.twice,
            books.in_flight,
            books.destroyed,
            wrong,
            detail,
        )

    def _parsed(self, references: int) -> Experiment:
        return parse_experiment(self.experiment(references))


@cache
def _start_fork_server() -> None:
    """A process that has imported everything, of which each run is a fork."""
    _context.set_forkserver_preload(["tests.faults.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), before]))  # it is told no other way
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def counted(places: Counter[str]) -> str:
    """ "sampling 7, commit 3", most first."""
    return ", ".join(f"{place} {times}" for place, times in places.most_common())
