"""Several training processes on this machine, started by torchrun from a job on disk.

A job is a directory with ``items.arrow`` (the training items) and ``job.json`` (settings and paths). The
processes add checkpoints, ``progress.jsonl`` (a line a step), ``trained/`` (saving.py), ``scored_rows.json``
and ``history.json`` when the policy is written, ``failure.json`` when one fails, and ``train.log`` (their
output). torchrun ends with this process, even if it is killed, and they end with torchrun.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qrpo_core.common import errors
from qrpo_core.common.errors import BusyError, ConfigError, DataError, QRPOError
from qrpo_core.common.log_tail import new_lines
from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.store.checkpoint_store import CheckpointStore
from qrpo_core.training.survival import LogprobComparison, Outcome

if TYPE_CHECKING:
    from qrpo_core.data.collator import Item

ITEMS, SETTINGS, LOG = "items.arrow", "job.json", "train.log"
PROGRESS, HISTORY, COMPARISON, FAILURE = "progress.jsonl", "history.json", "comparison.json", "failure.json"

#: Columns of items.arrow, and the items that are written at a time.
_TOKENS = ("prompt_token_ids", "token_ids")
_NUMBERS = ("target", "beta", "ref_logprob", "reward", "log_partition")
_BATCH = 4096

#: Environment variable of the processes: the process id with which they end.
AGENT = "QRPO_TRAIN_AGENT"

_logger = logging.getLogger("qrpo.train")
# The child asks for a signal at its parent's death, and becomes torchrun, which keeps that request.
_BOOTSTRAP = (
    "import os, sys; from qrpo_core.common.die_with_parent import die_with_parent; "
    "from qrpo_core.training.launch import AGENT; die_with_parent(int(sys.argv[1])); "
    "os.environ[AGENT] = str(os.getpid()); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def require_deepspeed(training: TrainingConfig) -> None:
    """Raise ConfigError if DeepSpeed is set and not installed, or would return rounded weights.

    With 16-bit weights it returns the trained float32 weights rounded to the nearest.
    """
    where, path = "training.deepspeed", training.deepspeed
    if path is None:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "training.deepspeed needs the package deepspeed", where=where, remedy="pip install deepspeed"
        )
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"no DeepSpeed config {path!r}", where=where, remedy="give the path of a JSON file"
        ) from None
    halves = [name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled", False)]
    if halves:
        raise ConfigError(
            f"{path!r} turns {halves[0]} on: DeepSpeed would round weights to the nearest, which loses a "
            "training with a small learning rate",
            where=where,
            remedy=f"set {halves[0]}.enabled to false, or use training.parallel fsdp, which shards float32",
        )


def launch(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    work: Path,
    stored: CheckpointStore | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    run_name: str = "training",
) -> Outcome:
    """`run.train_policy` in `training.processes` processes; `work` becomes the job.

    Raises the error of a process, or QRPOError with the last lines of the log if one dies without a message.
    """
    with exclusive_lock(work / "launch.lock"):  # another run's processes must keep their files
        write_job(
            items,
            directory,
            out,
            work,
            objective=objective,
            training=training,
            stored=stored,
            run_name=run_name,
        )
        for name in (PROGRESS, HISTORY, COMPARISON, FAILURE, LOG):
            (work / name).unlink(missing_ok=True)
        process = _torchrun(training.processes, work)
        try:
            status = _follow(process, work, on_step)
        finally:
            _end(process)
        if status != 0 or not (work / HISTORY).is_file():
            raise _failure(work, status)
        history = json.loads((work / HISTORY).read_text(encoding="utf-8"))
        return Outcome(history, LogprobComparison.from_json((work / COMPARISON).read_bytes()))


def write_job(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    job: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
    stored: CheckpointStore | None = None,
    run_name: str = "training",
) -> None:
    """Write the job directory that ``python -m qrpo_core.training JOB`` works from. Paths are made absolute.

    Raises DataError for a mixture of examples and pairs.
    """
    import pyarrow as pa

    from qrpo_core.data.collator import Pair, rows_of

    pairs = sum(isinstance(item, Pair) for item in items)
    if pairs not in (0, len(items)):
        raise DataError(f"{pairs} of {len(items)} items are pairs", remedy="give items of one kind")
    schema = pa.schema(
        {name: pa.list_(pa.int32()) for name in _TOKENS} | {name: pa.float64() for name in _NUMBERS}
    )
    job.mkdir(parents=True, exist_ok=True)
    new = job / f"{ITEMS}.new"  # a reader of these items may still have the old file mapped
    with pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(items), _BATCH):
            batch = [items[place] for place in range(start, min(start + _BATCH, len(items)))]
            rows = [row for item in batch for row in rows_of(item)]
            columns = [[getattr(row, name) for row in rows] for name in schema.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    os.replace(new, job / ITEMS)
    settings = {
        "directory": str(Path(directory).absolute()),
        "out": str(Path(out).absolute()),
        "pairs": pairs > 0,
        "objective": objective.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "stored": None if stored is None else stored.to_json(),
        "run_name": run_name,
    }
    (job / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_job(job: Path) -> tuple[Sequence[Item], dict[str, Any]]:
    """The items and the keyword arguments of `run.train_here` that `write_job` wrote.

    Token ids are views of the mapped file: the processes of a machine share its memory.
    """
    import numpy as np
    import pyarrow as pa

    from qrpo_core.data.collator import ExampleColumns, PairColumns

    try:
        settings = json.loads((job / SETTINGS).read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(job / ITEMS))).read_all()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the job: {error}", where=str(job), remedy="see write_job") from None
    examples = ExampleColumns(
        *(table[name] for name in _TOKENS), *(table[name].to_numpy() for name in _NUMBERS)
    )
    rows = np.arange(len(table))
    return PairColumns(examples, rows[::2], rows[1::2]) if settings["pairs"] else examples, {
        "directory": Path(settings["directory"]),
        "out": Path(settings["out"]),
        "objective": ObjectiveConfig.model_validate(settings["objective"]),
        "training": TrainingConfig.model_validate(settings["training"]),
        "work": job,
        "stored": None if settings["stored"] is None else CheckpointStore.from_json(settings["stored"]),
        "run_name": settings["run_name"],
    }


def write_failure(job: Path, error: Exception) -> None:
    """Write the first failure of a job for its launcher; later ones are its consequences."""
    if not isinstance(error, QRPOError):
        error = QRPOError(
            f"training failed: {type(error).__name__}: {error}",
            where=str(job / LOG),
            remedy="read the end of that log",
        )
    failure = {
        "kind": type(error).__name__,
        "message": error.message,
        "where": error.where,
        "remedy": error.remedy,
    }
    with contextlib.suppress(FileExistsError), (job / FAILURE).open("x", encoding="utf-8") as file:
        json.dump(failure, file)


@contextlib.contextmanager
def exclusive_lock(lock: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold a lock file; raises BusyError if another process holds it for `patience` seconds.

    The lock ends with the process, so a kill leaves none behind. Processes of a killed run may live on for a
    moment, hence the patience.
    """
    deadline = time.monotonic() + patience
    while (file := _locked(lock)) is None:
        if time.monotonic() > deadline:
            raise BusyError(
                "another run is training this policy",
                where=str(lock.parent),
                remedy="wait until it has ended, then run again: its results are used",
            )
        time.sleep(0.1)
    with file:
        yield


def is_held(lock: Path) -> bool:
    """Whether another process holds a lock file at this moment."""
    if not lock.exists():
        return False
    file = _locked(lock)
    if file is not None:
        file.close()
    return file is None


def _locked(lock: Path) -> BinaryIO | None:
    """The locked file; None if another process holds it, or has just deleted it with its folder."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = None
    try:
        file = lock.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    if file is not None:
        file.close()
    return None


def _torchrun(processes: int, job: Path) -> subprocess.Popen[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with (job / LOG).open("ab") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                _BOOTSTRAP,
                str(os.getpid()),
                *torchrun,
                "-m",
                "qrpo_core.training",
                str(job),
            ],
            env=_environment(processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which ends the others
        )


def _environment(processes: int) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    if "site-packages" not in root.parts:  # a source tree, which the processes must find as well
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(root))))
    return environment


def _follow(
    process: subprocess.Popen[bytes], job: Path, on_step: Callable[[int, int, dict[str, float]], None] | None
) -> int:
    """The exit status of the process; reports its steps and logs its lines meanwhile."""
    steps, lines = new_lines(job / PROGRESS), new_lines(job / LOG)
    while True:
        ended = process.poll() is not None  # before reading: the lines written before its end are still read
        for line in next(steps):
            if on_step is not None:
                on_step(*json.loads(line))
        for line in next(lines):
            _logger.info("%s", line)
        if ended:
            return int(process.returncode)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and its processes, unless they have ended."""
    if process.poll() is None:
        process.terminate()  # it passes the signal on
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    process.kill()
    process.wait()


def _failure(job: Path, status: int) -> QRPOError:
    try:
        failure = json.loads((job / FAILURE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = (job / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        output = " / ".join(last) or "they printed nothing"
        return QRPOError(
            f"the training processes ended with status {status}: {output}",
            where=str(job / LOG),
            remedy="read that log; a process that the system killed lacked memory",
        )
    kind: type[QRPOError] = getattr(errors, failure.pop("kind"))
    return kind(failure.pop("message"), **failure)
