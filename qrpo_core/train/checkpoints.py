"""Checkpoints of a training: when one is written, when it counts, and which one is gone on from.

The Trainer writes them (weights, optimiser, scheduler, random states of every process, history). What is
added here makes one count only when it is whole: a marker, written last, lists every file with its size and
digest. A folder without the marker was cut off, a folder that does not fit its marker was damaged; neither
is used.

Disk: a checkpoint holds the weights and Adam's two moments in float32, 12 bytes a trained parameter
(8 billion: 96 GB; adapters: megabytes). At most two lie in `work` at any time, also while one is written.
Once a training is done they make room for its weights (saving.py), 4 bytes a parameter.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qrpo_core.errors import StoreError
from qrpo_core.ids import digest_file

#: The file that makes a checkpoint count.
MARKER = "complete.json"
#: Whole checkpoints that are kept: the second is for the day the first is damaged.
KEPT = 2

_PREFIX = "checkpoint-"  # the Trainer's
_logger = logging.getLogger("qrpo.train")


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Has the Trainer save every `minutes` of wall time (0: after every step), and seals what it saved.

    work : the Trainer's output_dir; with several machines, one that all of them share.
    facts : what a later run must have in common to go on from here (see `newest`), JSON-ready.

    The first process decides and tells the others, so that all save after the same step. After the last step
    nothing is saved: the policy itself comes next.
    """

    def __init__(self, work: Path, minutes: float, facts: dict[str, Any]) -> None:
        self.work = work
        self.seconds = 60 * minutes
        self.facts = facts
        self.due = time.monotonic() + self.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save after this step."""
        if state.global_step >= state.max_steps:
            return
        due = time.monotonic() >= self.due
        if due and args.process_index == 0:
            _keep(self.work, KEPT - 1)  # before the others hear of it and begin to write
        control.should_save = from_first(due, args)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint when every process has written its part."""
        _wait_for_all(args)
        if args.process_index == 0:
            seal(self.work / f"{_PREFIX}{state.global_step}", self.facts)
        self.due = time.monotonic() + self.seconds


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Make a checkpoint count: bring every file to the disk, then write the marker in one step."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _to_disk(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest_file(path)]
    for path in (*filter(Path.is_dir, folder.rglob("*")), folder):
        _to_disk(path)
    unnamed = folder / f"{MARKER}.new"
    unnamed.write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
    _to_disk(unnamed)
    os.replace(unnamed, folder / MARKER)
    _to_disk(folder)
    _to_disk(folder.parent)


def trouble(folder: Path) -> str:
    """Why a checkpoint must not be used; empty when every file is what the marker says."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read ({error!r})"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if digest_file(path) != digest:
            return f"{name} has another content"
    return ""


def newest(work: Path, facts: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of `work`, or None; what cannot be used is deleted, with a log line.

    facts : `training` names what is trained on what, `layout` the form of the files (whole, fsdp, deepspeed),
        `processes` how many wrote.

    Raises StoreError if it was written by another training, or in a form that this one cannot read.
    """
    for candidate in _folders(work):
        folder = whole(candidate, facts, ("training", "layout"))
        if folder is None:
            continue
        written = json.loads((folder / MARKER).read_text(encoding="utf-8"))["facts"]
        if written["processes"] != facts["processes"]:
            _logger.warning(
                "%s was written by %s processes, now there are %s: dropout draws other masks",
                folder,
                written["processes"],
                facts["processes"],
            )
        return folder
    return None


def whole(folder: Path, facts: dict[str, Any], same: Sequence[str]) -> Path | None:
    """The folder if it was sealed and is what its marker says, else None, and what is left of it is deleted.

    Raises StoreError where it was sealed with other `facts`, as to the names in `same`.
    """
    if not folder.is_dir():
        return None
    if problem := trouble(folder):
        _logger.warning("%s is not used: %s", folder, problem)
        _remove(folder)
        return None
    written = json.loads((folder / MARKER).read_text(encoding="utf-8"))["facts"]
    for name in same:
        if written[name] != facts[name]:
            raise StoreError(
                f"this checkpoint is of {name} {written[name]!r}, not {facts[name]!r}",
                where=str(folder),
                remedy="go on with the settings it was written with, or delete it to begin again",
            )
    return folder


def drop_checkpoints(work: Path) -> None:
    """Delete every checkpoint: the training is done, and what it gave is kept elsewhere."""
    _keep(work, 0)


def from_first(value: Any, args: Any) -> Any:
    """The first process's value, in every process. args : TrainingArguments."""
    if args.world_size == 1:
        return value
    import torch

    told = [value]
    torch.distributed.broadcast_object_list(told, src=0, device=args.device)
    return told[0]


def _folders(work: Path) -> list[Path]:
    """Checkpoints, whole or not, the newest first."""
    numbered = [
        (int(number), path)
        for path in work.glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdecimal() and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def _keep(work: Path, count: int) -> None:
    for folder in _folders(work)[count:]:
        _remove(folder)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first: half-deleted, it must not count
    shutil.rmtree(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wait_for_all(args: Any) -> None:
    if args.world_size > 1:
        import torch

        torch.distributed.barrier()
