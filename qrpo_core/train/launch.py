"""Several training processes on this machine: a job on disk, torchrun, and what comes back.

A job is a directory: ``items.arrow`` (what is trained on), ``job.json`` (settings and paths); the processes
add checkpoints, ``progress.jsonl`` (a line a step), ``trained/`` (saving.py), ``scored_rows.json`` and
``history.json`` when the policy is written, ``failure.json`` when one of them fails, and ``train.log`` (all
they print). They end when this process does, killed or not: torchrun dies with it, they die with torchrun.

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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qrpo_core import errors
from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.errors import ConfigError, DataError, QRPOError, StoreError
from qrpo_core.followed import appended
from qrpo_core.train.survival import Outcome, ScoredRows

if TYPE_CHECKING:
    from qrpo_core.data.collator import Example, Item

ITEMS, SETTINGS, LOG = "items.arrow", "job.json", "train.log"
PROGRESS, HISTORY, SCORED, FAILURE = "progress.jsonl", "history.json", "scored_rows.json", "failure.json"

#: In the environment of the processes: whose death is theirs.
AGENT = "QRPO_TRAIN_AGENT"

_logger = logging.getLogger("qrpo.train")
# Run in the child; it becomes torchrun, which keeps the signal that its parent's death sends.
_BOOT = (
    "import os, sys; from qrpo_core.die_with_parent import die_with_parent; "
    "from qrpo_core.train.launch import AGENT; die_with_parent(int(sys.argv[1])); "
    "os.environ[AGENT] = str(os.getpid()); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def require_deepspeed(training: TrainingConfig) -> None:
    """Raise ConfigError where DeepSpeed is asked for and cannot be had, or would give rounded weights.

    With 16-bit weights on it keeps the trained ones to itself, and hands over what is nearest to them.
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
            f"{path!r} turns {halves[0]} on: DeepSpeed would hand over weights rounded to the nearest, where "
            "a training with a small learning rate is lost",
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
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Outcome:
    """`run.train_policy` in `training.processes` processes; see there. `work` becomes the job.

    Raises what the processes raise; QRPOError with the last lines of the log where one dies without a word.
    """
    with alone(work / "launch.lock"):  # the processes of a run that goes on must keep their files
        write_job(items, directory, out, work, objective=objective, training=training)
        for name in (PROGRESS, HISTORY, SCORED, FAILURE, LOG):
            (work / name).unlink(missing_ok=True)
        process = _torchrun(training.processes, work)
        try:
            status = _follow(process, work, on_step)
        finally:
            _end(process)
        if status != 0 or not (work / HISTORY).is_file():
            raise _failure(work, status)
        history = json.loads((work / HISTORY).read_text(encoding="utf-8"))
        return Outcome(history, ScoredRows.from_json((work / SCORED).read_bytes()))


def write_job(
    items: Sequence[Item],
    directory: Path,
    out: Path,
    job: Path,
    *,
    objective: ObjectiveConfig,
    training: TrainingConfig,
) -> None:
    """Write the job directory that ``python -m qrpo_core.train JOB`` works from. Paths are made absolute.

    Raises DataError for a mixture of examples and pairs.
    """
    import pyarrow as pa

    from qrpo_core.data.collator import Pair, rows_of

    pairs = sum(isinstance(item, Pair) for item in items)
    if pairs not in (0, len(items)):
        raise DataError(f"{pairs} of {len(items)} items are pairs", remedy="give items of one kind")
    rows = [row for item in items for row in rows_of(item)]
    table = pa.table(
        {
            **{
                name: pa.array([getattr(row, name) for row in rows], pa.large_list(pa.int32()))
                for name in ("prompt_token_ids", "token_ids")
            },
            **{
                name: pa.array([float(getattr(row, name)) for row in rows], pa.float64()) for name in _NUMBERS
            },
        }
    )
    job.mkdir(parents=True, exist_ok=True)
    new = job / f"{ITEMS}.new"  # an old one may still be mapped: by whoever read these items from it
    with pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(new, job / ITEMS)
    settings = {
        "directory": str(Path(directory).absolute()),
        "out": str(Path(out).absolute()),
        "pairs": pairs > 0,
        "objective": objective.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    (job / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_job(job: Path) -> tuple[list[Item], dict[str, Any]]:
    """The items and the keyword arguments of `run.train_here`, as `write_job` was given them.

    Token ids are views of the mapped file: the processes of a machine share its memory.
    """
    from qrpo_core.data.collator import Pair

    try:
        settings = json.loads((job / SETTINGS).read_text(encoding="utf-8"))
        examples = _read_examples(job / ITEMS)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the job: {error}", where=str(job), remedy="see write_job") from None
    items: list[Item] = list(examples)
    if settings["pairs"]:
        items = [Pair(*two) for two in zip(examples[::2], examples[1::2], strict=True)]
    return items, {
        "directory": Path(settings["directory"]),
        "out": Path(settings["out"]),
        "objective": ObjectiveConfig.model_validate(settings["objective"]),
        "training": TrainingConfig.model_validate(settings["training"]),
        "work": job,
    }


def write_failure(job: Path, error: Exception) -> None:
    """Leave the first failure of a job for its launcher; what the others meet follows from it."""
    told = error if isinstance(error, QRPOError) else None
    failure = {
        "kind": type(error).__name__ if told else "QRPOError",
        "message": told.message if told else f"training failed: {type(error).__name__}: {error}",
        "where": told.where if told else str(job / LOG),
        "remedy": told.remedy if told else "read the end of that log",
    }
    with contextlib.suppress(FileExistsError), (job / FAILURE).open("x", encoding="utf-8") as file:
        json.dump(failure, file)


@contextlib.contextmanager
def alone(lock: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold a lock file while training; StoreError if another process holds it for `patience` seconds.

    The lock goes with the process, so a kill leaves none behind. What a killed run started may outlive it for
    a moment, hence the patience.
    """
    deadline = time.monotonic() + patience
    while (file := _locked(lock)) is None:
        if time.monotonic() > deadline:
            raise StoreError(
                "another run is training this policy",
                where=str(lock.parent),
                remedy="wait until it has ended, then run again: what it has made is used",
            )
        time.sleep(0.1)
    with file:
        yield


def _locked(lock: Path) -> BinaryIO | None:
    """The lock file, held; None while another process holds it, or has just deleted it with its folder."""
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


_NUMBERS = ("target", "beta", "ref_logprob", "reward")


def _read_examples(path: Path) -> list[Example]:
    import pyarrow as pa

    from qrpo_core.data.collator import Example

    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    tokens = [_lists(table.column(name)) for name in ("prompt_token_ids", "token_ids")]
    numbers = [table.column(name).to_pylist() for name in _NUMBERS]
    return [Example(*row) for row in zip(*tokens, *numbers, strict=True)]


def _lists(column: Any) -> Iterator[Any]:
    """The rows of a list column as numpy views."""
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=True)
        for start, end in pairwise(chunk.offsets.to_pylist()):
            yield values[start:end]


def _torchrun(processes: int, job: Path) -> subprocess.Popen[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with (job / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(os.getpid()), *torchrun, "-m", "qrpo_core.train", str(job)],
            env=_environment(processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which ends the others
        )


def _environment(processes: int) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    if "site-packages" not in root.parts:  # not installed, or in place: our root counts all the same
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(root))))
    return environment


def _follow(
    process: subprocess.Popen[bytes], job: Path, on_step: Callable[[int, int, dict[str, float]], None] | None
) -> int:
    """Pass on steps and lines until the process ends; return its status."""
    steps, lines = appended(job / PROGRESS), appended(job / LOG)
    while True:
        ended = process.poll() is not None  # asked first: what it wrote before its end is still passed on
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
    """End torchrun, and with it the processes it started; on the usual way it has ended already."""
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
        said = " / ".join(last) or "they printed nothing"
        return QRPOError(
            f"the training processes ended with status {status}: {said}",
            where=str(job / LOG),
            remedy="read that log; a process that the system killed lacked memory",
        )
    kind: type[QRPOError] = getattr(errors, failure.pop("kind"))
    return kind(failure.pop("message"), **failure)
