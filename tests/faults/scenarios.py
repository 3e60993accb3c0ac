"""The faults that a run must survive on every back end: functions that inject one and close the books."""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.interface import Objects
from tests.faults.accounts import Outcome, blocks_in, total
from tests.faults.driver import DONE, INTERRUPTED, REFUSED
from tests.faults.scene import Run, Scene, Truth, counted

#: Stages in their order, and what the table calls them.
STAGES = {
    "prepare prompts": "prompts",
    "sample": "sampling",
    "reward": "annotation",
    "compute quantiles": "quantiles",
    "logprob": "log-probs",
    "assemble training set": "training set",
}
_BLOCKS = ("sample", "reward", "logprob")


@dataclass
class Ground:
    """Where scenes are set: a back end, and what undisturbed runs make of the experiment.

    store : makes the settings of a new, empty store in or below a folder.
    """

    folder: Path
    settings: dict[str, Any]
    truth: Truth
    store: Callable[[Path], StoreConfig]
    scenes: list[Scene] = field(default_factory=list)

    def scene(self, endpoint: str = "", store: StoreConfig | None = None) -> Scene:
        folder = self.folder / secrets.token_hex(4)
        folder.mkdir(parents=True)
        self.scenes.append(Scene(folder, self.settings, store or self.store(folder), self.truth, endpoint))
        return self.scenes[-1]


def local(folder: Path) -> StoreConfig:
    """A store in a directory, with blocks small enough that a run has some."""
    return StoreConfig(path=str(folder / "store"), rows_per_block=5)


def sigkills(ground: Ground, kills: int, seed: int) -> Outcome:
    """SIGKILL at random moments over all stages, most of them where rows are bought; then run until done.

    Every third kill comes from outside after a random time, the others at a random point of a stage. Where
    all rows of a store are bought before it was killed so often, another store is begun.
    """
    rng = random.Random(seed)
    places, outcomes = Counter[str](), []
    while places.total() < kills:
        scene, before = ground.scene(), places.total()
        for number, stage in enumerate(_stages(kills, rng)):
            if places.total() < kills:
                run = _kill_in(scene, stage, number % 3 == 2, rng)
                if run.wait() == -signal.SIGKILL:
                    places[_where(run)] += 1
                scene.look()
        outcomes.append(scene.close("SIGKILL of a run", places.total() - before))
    outcome = total(outcomes)
    outcome.detail = counted(places)
    return outcome


def _stages(count: int, rng: random.Random) -> list[str]:
    """Where to kill next, in the order of a run: each stage of rows at least once."""
    stages = [*_BLOCKS, "compute quantiles", *rng.choices(_BLOCKS, k=max(count - 4, 0))]
    return sorted(stages, key=list(STAGES).index)


def _kill_in(scene: Scene, stage: str, by_time: bool, rng: random.Random) -> Run:
    rows = stage in _BLOCKS
    if not by_time:
        return scene.start(seed=rng.randrange(1 << 30), death=(stage, "", rng.randint(1, 16 if rows else 3)))
    run = scene.start(seed=rng.randrange(1 << 30))
    run.reaches(stage)
    time.sleep(rng.uniform(0, 0.04 if rows else 0.01))
    run.process.kill()
    return run


def _where(run: Run) -> str:
    stage, point = run.place
    return "commit" if point.startswith(("before", "after")) else STAGES.get(stage, stage)


def commit_kills(ground: Ground, kills: int, seed: int) -> Outcome:
    """SIGKILL just before and just after each step of a commit, in the stages that commit blocks."""
    rng = random.Random(seed)
    scene, places = ground.scene(), Counter[str]()
    points = [f"{when} {what}" for what in ("rows", "manifest") for when in ("before", "after")]
    if scene.back_end == "directory":
        points += ["before link", "after link"]
    deaths = [(_BLOCKS[number % 3], points[number % len(points)]) for number in range(kills)]
    for stage, point in sorted(deaths, key=lambda death: list(STAGES).index(death[0])):
        run = scene.start(seed=rng.randrange(1 << 30), death=(stage, point, 1))
        if run.wait() == -signal.SIGKILL:
            places[point] += 1
        scene.look()
    return scene.close("SIGKILL at a step of a commit", places.total(), detail=counted(places))


def interrupts(ground: Ground, times: int, seed: int) -> Outcome:
    """SIGINT at random moments: status 130, and a next run goes on."""
    rng = random.Random(seed)

    def interrupt(scene: Scene, number: int) -> bool:
        run = scene.start(seed=rng.randrange(1 << 30))
        run.reaches(_BLOCKS[number % len(_BLOCKS)])
        time.sleep(rng.uniform(0, 0.04))
        assert run.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(run.process.pid, signal.SIGINT)
        status = run.wait()
        scene.look()
        assert status in (DONE, INTERRUPTED), (status, run.printed)
        return status == INTERRUPTED

    return _often(ground, "Ctrl-C", times, interrupt)


def _often(ground: Ground, fault: str, times: int, inject: Callable[[Scene, int], bool]) -> Outcome:
    """A fault so many times, one run after the other.

    inject : returns False where the run was done before the fault could come; that counts for nothing, and
        another store is begun.
    """
    outcomes: list[Outcome] = []
    number = 0
    while number < times:
        scene, before = ground.scene(), number
        while number < times and inject(scene, number):
            number += 1
        outcomes.append(scene.close(fault, number - before))
    return total(outcomes)


def race(ground: Ground, processes: int = 16, *, until: str = "") -> Outcome:
    """Processes that start at one moment on one empty store and take blocks in the same order.

    until : the stage before which they stop; one more run goes on to the end.
    """
    scene = ground.scene()
    gate = scene.folder / "gate"
    runs = [scene.start(gate=gate, seed=0, until=until) for _ in range(processes)]
    for run in runs:
        run.reaches("start")
    gate.touch()
    assert [run.wait() for run in runs] == [DONE] * processes, [run.printed for run in runs]
    scene.look()
    return scene.close(f"{processes} processes race for the same blocks", processes)


def two_budgets(ground: Ground) -> Outcome:
    """Two runs at once that ask for 4 and for 6 references of every prompt."""
    scene = ground.scene()
    gate = scene.folder / "gate"
    runs = [scene.start(references, gate=gate) for references in (4, 6)]
    for run in runs:
        run.reaches("start")
    gate.touch()
    assert [run.wait() for run in runs] == [DONE, DONE], [run.printed for run in runs]
    scene.look()
    return scene.outcome("two runs at once with budgets of 4 and 6", 2, 6, 4)


def flip(objects: Objects, key: str, rng: random.Random) -> None:
    """One bit of an object becomes another."""
    data = bytearray(objects.read(key))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    objects.write(key, bytes(data))


def truncate(objects: Objects, key: str, rng: random.Random) -> None:
    """An object loses its end."""
    data = objects.read(key)
    objects.write(key, data[: rng.randrange(len(data))])


def remove(objects: Objects, key: str, rng: random.Random) -> None:
    """An object goes away."""
    objects.delete(key)


#: What can happen to the data of a block, or to its manifest.
DAMAGE: dict[str, tuple[Callable[[Objects, str, random.Random], None], str]] = {
    "a flipped bit in a block": (flip, "file"),
    "a truncated block": (truncate, "file"),
    "a missing block": (remove, "file"),
    "a flipped bit in a block's manifest": (flip, "index"),
    "a truncated manifest of a block": (truncate, "index"),
    "a missing manifest of a block": (remove, "index"),
}


def damage(ground: Ground, whats: Sequence[str], seed: int) -> Outcome:
    """Hurt blocks after a run, each a block of the next step; a run of a larger budget reads them all."""
    rng = random.Random(seed)
    scene = ground.scene()
    assert scene.run() == DONE, scene.runs[-1].printed
    blocks = list(blocks_in(scene.objects))
    rng.shuffle(blocks)
    for number, what in enumerate(whats):
        step = _BLOCKS[number % len(_BLOCKS)]
        block = next(block for block in blocks if block[0] == step)
        blocks.remove(block)
        how, part = DAMAGE[what]
        scene.hurt(block, part, partial(how, rng=rng))
    return scene.close(", ".join(dict.fromkeys(whats)), len(whats), references=6)


def damaged_artifacts(ground: Ground, seed: int) -> Outcome:
    """Hurt a file of every artifact: runs that need it stop until `qrpo verify --repair`, then make it."""
    rng = random.Random(seed)
    scene = ground.scene()
    assert scene.run() == DONE, scene.runs[-1].printed
    hurts = [flip, truncate, remove]
    rng.shuffle(hurts)
    files = {"prompts": "prompts", "quantiles": "rank_counts", "training_set": "training_set"}
    keys = list(scene.objects.keys("artifacts/"))
    for (step, name), hurt in zip(files.items(), hurts, strict=True):
        [key] = [
            key for key in keys if key.startswith(f"artifacts/{step}/") and key.endswith(f"/{name}.parquet")
        ]
        hurt(scene.objects, key, rng)
    bought = scene.journal.bought()
    assert scene.run() == REFUSED
    one_line(scene.runs[-1], "qrpo verify --repair")
    assert scene.repair() == len(files)
    outcome = scene.close("a damaged file of an artifact", len(files))
    assert scene.journal.bought() == bought
    return outcome


def full_disk(ground: Ground, times: int, seed: int) -> Outcome:
    """From a random moment on no file can grow: the run ends with one line; with room the next goes on."""
    rng = random.Random(seed)

    def fill(scene: Scene, number: int) -> bool:
        place = (_BLOCKS[number % len(_BLOCKS)], "", rng.randint(1, 20))
        run = scene.start(seed=rng.randrange(1 << 30), full=place)
        status = run.wait()
        scene.look()
        if status == DONE:
            return False
        assert status == REFUSED, (status, run.printed)
        one_line(run, "the disk is full", "make room")
        return True

    return _often(ground, "a full disk", times, fill)


def small_disk(ground: Ground, folder: Path, grow: Callable[[], None]) -> Outcome:
    """A file system in `folder` too small for the run: one line; it goes on where `grow` made room."""
    scene = ground.scene(store=StoreConfig(path=str(folder / "store"), rows_per_block=5))
    for _ in range(2):
        assert scene.run() == REFUSED, scene.runs[-1].printed
        one_line(scene.runs[-1], "the disk is full", "make room")
        assert not list((folder / "store" / "tmp").iterdir()), "a part was left"
    assert scene.journal.count("commit") > 0
    grow()
    return scene.close("a disk too small", 2)


def jumping_clock(ground: Ground, runs: int, seed: int) -> Outcome:
    """Every look at the calendar gives another time within two years, over runs that are killed."""
    rng = random.Random(seed)
    scene = ground.scene()
    for number in range(runs):
        stage = _BLOCKS[number % len(_BLOCKS)]
        run = scene.start(
            seed=rng.randrange(1 << 30), jumping_clock=True, death=(stage, "", rng.randint(10, 40))
        )
        assert run.wait() in (DONE, -signal.SIGKILL), run.printed
        scene.look()
        _change_times(scene, rng)
    assert scene.run(jumping_clock=True) == DONE, scene.runs[-1].printed
    return scene.close("a clock that jumps", scene.journal.count("jump"))


def _change_times(scene: Scene, rng: random.Random) -> None:
    """What the file system remembers of the clock jumps, too."""
    if scene.back_end == "directory":
        for path in Path(scene.store.path).rglob("*"):
            moment = time.time() + rng.uniform(-365, 365) * 86400
            os.utime(path, (moment, moment))


def one_line(run: Run, *says: str) -> None:
    """The run has printed one line about its end, and this is in it; it may have warned of other things."""
    (line,) = [line for line in run.printed.splitlines() if " | WARNING | " not in line]
    assert line.startswith("qrpo: "), run.printed
    for text in says:
        assert text in line, run.printed
