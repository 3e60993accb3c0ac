"""Checkpoints of a training: when they are written, which are complete, and which one training resumes from.

The Trainer writes them (weights, optimiser, scheduler, random states of every process, history). A marker,
written last, lists every file with its size and digest. A folder without a marker is unfinished, and a folder
that differs from its marker is damaged; neither is used.

Disk: a checkpoint holds the weights and Adam's two moments in float32, 12 bytes a trained parameter
(8 billion: 96 GB; adapters: megabytes). At most two are in `work` at any time, also while one is written, and
at most three in the store. At the end of a training its weights (saving.py, 4 bytes a parameter) replace
those in `work`; those in the store stay until the policy is committed.
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

from qrpo_core.common.errors import GO_ON, CapError, DamagedError, MissingError, StoreError
from qrpo_core.common.hashing import digest_file
from qrpo_core.store.checkpoint_store import KEPT, MARKER, CheckpointStore
from qrpo_core.training.stopping import stop_requested
from qrpo_core.training.uploads import Uploads

_PREFIX = "checkpoint-"  # the Trainer's
_logger = logging.getLogger("qrpo.train")


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Makes the Trainer save every `minutes` of wall time (0: after every step), and seals its checkpoints.

    work : the Trainer's output_dir; with several machines, one that all of them share.
    facts : the facts that a later run must share to resume (see `newest_checkpoint`), JSON-ready.
    stored : where the first process puts each sealed checkpoint while training goes on; None: nowhere.

    The first process decides for all, so that all save after the same step. Where `request_stop` was called,
    they save and raise CapError. A checkpoint is due, but waits,
    while the one before is on its way into the store. After the last step nothing is saved: the policy
    itself follows.
    """

    def __init__(
        self, work: Path, minutes: float, facts: dict[str, Any], stored: CheckpointStore | None = None
    ) -> None:
        self.work = work
        self.uploads = None if stored is None else Uploads(stored)
        self.seconds = 60 * minutes
        self.facts = facts
        self.due = time.monotonic() + self.seconds
        self.stop = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save after this step."""
        if state.global_step >= state.max_steps:
            return
        self.stop = broadcast_from_first(stop_requested(self.work), args)
        due = bool(self.stop) or time.monotonic() >= self.due
        if due and args.process_index == 0:
            if self.uploads is not None:
                self.uploads.wait()  # it reads files of the newest one
            _delete_older(self.work, KEPT - 1)  # before the others begin to write
        control.should_save = broadcast_from_first(due, args)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint when every process has written its part."""
        _wait_for_all(args)
        if args.process_index == 0:
            folder = self.work / f"{_PREFIX}{state.global_step}"
            seal(folder, self.facts)
            if self.uploads is not None:
                self.uploads.start(folder, state.global_step)
                if self.stop:
                    self.uploads.wait()
        if self.stop:
            where = f"training, after step {state.global_step} of {state.max_steps}"
            raise CapError(self.stop, where=where, remedy=GO_ON)
        self.due = time.monotonic() + self.seconds

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put no more into the store: the policy follows, and replaces the files."""
        if self.uploads is not None:
            self.uploads.stop()


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a checkpoint as complete: sync every file to the disk, then write the marker in one step."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest_file(path)]
    for path in (*filter(Path.is_dir, folder.rglob("*")), folder):
        _fsync(path)
    unnamed = folder / f"{MARKER}.new"
    unnamed.write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
    _fsync(unnamed)
    os.replace(unnamed, folder / MARKER)
    _fsync(folder)
    _fsync(folder.parent)


def damage(folder: Path) -> str:
    """The reason why a checkpoint must not be used; empty if every file matches the marker."""
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


def checkpoint_to_resume(
    work: Path, facts: dict[str, Any], stored: CheckpointStore | None = None
) -> Path | None:
    """`newest_checkpoint`, or a later one of the store, which is fetched into `work` first.

    A damaged one of the store is taken away from there, with a log line, and the one before is used.

    Raises StoreError as `newest_checkpoint`, and if the store does not answer: a training that began again
    would cost more than another run of this command.
    """
    found = newest_checkpoint(work, facts)
    here = -1 if found is None else _step(found)
    if stored is None:
        return found
    for each in stored.complete():
        if each.step <= here:
            break
        _require_same(each.facts, facts, ("training", "layout"), each.folder)
        target = work / f"{_PREFIX}{each.step}"
        _logger.info("fetching the checkpoint of step %s from the store", each.step)
        try:
            stored.get(each, target)
        except (DamagedError, MissingError) as error:
            _logger.warning("the checkpoint of step %s in the store is not used: %s", each.step, error)
            stored.discard(each)
            shutil.rmtree(target)
            continue
        _warn_of_processes(target, each.facts, facts)
        return target
    return found


def newest_checkpoint(work: Path, facts: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of `work`, or None; what cannot be used is deleted, with a log line.

    facts : `training` names what is trained on what, `layout` the form of the files (tensors, by
        resumable.py, or deepspeed), `processes` how many wrote.

    Raises StoreError if it was written by another training, or in a form that this one cannot read.
    """
    for candidate in _folders(work):
        folder = sealed(candidate, facts, ("training", "layout"))
        if folder is None:
            continue
        _warn_of_processes(folder, _facts(folder), facts)
        return folder
    return None


def sealed(folder: Path, facts: dict[str, Any], same: Sequence[str]) -> Path | None:
    """The folder if it matches its marker; otherwise delete it and return None.

    Raises StoreError if its `facts` differ in one of the names in `same`.
    """
    if not folder.is_dir():
        return None
    if problem := damage(folder):
        _logger.warning("%s is not used: %s", folder, problem)
        _remove(folder)
        return None
    _require_same(_facts(folder), facts, same, str(folder))
    return folder


def delete_checkpoints(work: Path) -> None:
    """Delete every checkpoint of a finished training."""
    _delete_older(work, 0)


def broadcast_from_first(value: Any, args: Any) -> Any:
    """The first process's value, in every process. args : TrainingArguments."""
    if args.world_size == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=args.device)
    return values[0]


def _facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MARKER).read_text(encoding="utf-8"))["facts"])


def _require_same(written: dict[str, Any], facts: dict[str, Any], same: Sequence[str], where: str) -> None:
    for name in same:
        if written[name] != facts[name]:
            raise StoreError(
                f"this checkpoint is of {name} {written[name]!r}, not {facts[name]!r}",
                where=where,
                remedy="resume with the settings it was written with, or delete it to begin again",
            )


def _warn_of_processes(folder: Path, written: dict[str, Any], facts: dict[str, Any]) -> None:
    if written["processes"] != facts["processes"]:
        _logger.warning(
            "%s was written by %s processes, now there are %s: dropout draws other masks",
            folder,
            written["processes"],
            facts["processes"],
        )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _folders(work: Path) -> list[Path]:
    """All checkpoints, unfinished ones included, the newest first."""
    numbered = [
        (int(number), path)
        for path in work.glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdecimal() and path.is_dir()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def _delete_older(work: Path, count: int) -> None:
    for folder in _folders(work)[count:]:
        _remove(folder)


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)  # first: half-deleted, it must not count
    shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wait_for_all(args: Any) -> None:
    if args.world_size > 1:
        import torch

        torch.distributed.barrier()
