"""What every benchmark's result carries (where, with what, how it was started), and how it is given out."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SCRIPT = Path(sys.argv[0]).resolve()  # before it may change its directory


def hardware() -> dict[str, Any]:
    """CPU, cores that this process may use, memory (decimal GB), GPU, load of other work, Python and torch.

    Nothing that tells one machine from another of its kind: no kernel, no host name, no path.
    """
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu(),
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),  # without importing it: peak memory is measured
    }


def gpu() -> str | None:
    """Name, memory and driver of each GPU, without CUDA; None where there is none."""
    asked = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    found = _output("nvidia-smi", *asked)
    return found or ("one that nvidia-smi does not name" if Path("/dev/nvidia0").exists() else None)


def _output(*command: str) -> str:
    """What a command prints, "" if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, None where it is missing; nothing is imported."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def command_line() -> str:
    """How this script was started; of an absolute path among its arguments, the last part."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    script = str(_SCRIPT.relative_to(ROOT)) if ROOT in _SCRIPT.parents else _SCRIPT.name
    return " ".join(["python", script, *words])


def commit() -> str:
    """The checked-out commit, with "+changes" where what is measured differs from it.

    For a copy without git: the environment variable QRPO_COMMIT, or a file of that name at its top.
    """
    kept = ROOT / "QRPO_COMMIT"
    told = os.environ.get("QRPO_COMMIT", kept.read_text(encoding="utf-8") if kept.is_file() else "").strip()
    if told:
        return told
    git = ("git", "-C", str(ROOT))
    measured = ("qrpo_core", "tasks", "flows", "experiments", "benchmarks/*.py", "benchmarks/*.sh")
    changed = _output(*git, "status", "--porcelain", "--", *measured)
    return (_output(*git, "rev-parse", "HEAD") or "unknown") + ("+changes" if changed else "")


def about(benchmark: str, **more: Any) -> dict[str, Any]:
    """The head of a result, taken before anything is measured: the load is that of other work.

    more : goals, versions and whatever else is to stand there.
    """
    return {
        "benchmark": benchmark,
        **more,
        "hardware": hardware(),
        "commit": commit(),
        "command": command_line(),
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser of the command line with `--output`; description : the script's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    return parser


def publish(result: dict[str, Any], output: Path | None, *, shown: str | None = None) -> None:
    """Print a result as JSON and write it to `output`, if that is given.

    shown : printed instead of the JSON.
    """
    text = json.dumps(result, indent=1)
    print(text if shown is None else shown)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
