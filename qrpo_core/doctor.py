"""What a run needs of the machine, as checks that say what to do: `qrpo doctor` shows them.

A check looks and changes nothing. Others add theirs to `CHECKS`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from qrpo_core import __version__
from qrpo_core.engines.config import VllmConfig
from qrpo_core.errors import ConfigError
from qrpo_core.show import table

#: The oldest Python that the project runs on.
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    name : what, in a few words.
    ok : whether it is as it has to be.
    what : what was found.
    remedy : what to do about it; empty if ok.
    needed : whether every run needs it; else only what `remedy` names.
    """

    name: str
    ok: bool
    what: str
    remedy: str = ""
    needed: bool = False


def check_python() -> Check:
    """The version of Python."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    oldest = ".".join(str(part) for part in OLDEST_PYTHON)
    ok = sys.version_info[:2] >= OLDEST_PYTHON
    return Check("python", ok, found, "" if ok else f"install Python {oldest} or newer", needed=True)


def check_bubblewrap() -> Check:
    """Whether the program is there that reward kind `code` runs judged programs under."""
    found = shutil.which("bwrap")
    if found:
        return Check("bubblewrap", True, found)
    return Check(
        "bubblewrap",
        False,
        "bwrap is not on the path",
        "apt install bubblewrap (or your system's package); only reward kind code needs it",
    )


def check_sandbox() -> Check:
    """Whether a sandbox holds: a program that tries to get out of it is run in it, 0.3 s.

    That includes the limits on processes and memory, the network, the file system and privileges.
    """
    from qrpo_core.rewards.sandbox import modes
    from qrpo_core.rewards.sandbox_probe import try_mode

    if shutil.which("bwrap") is None:
        return Check("sandbox", False, "not tried without bubblewrap", "install bubblewrap")
    reasons = []
    for mode in modes():
        reason = try_mode(mode)
        if reason is None:
            return Check("sandbox", True, f"holds (started as {mode})")
        reasons.append(f"as {mode}: {reason}")
    return Check(
        "sandbox",
        False,
        "; ".join(reasons),
        "allow namespaces to this user (sysctl kernel.unprivileged_userns_clone=1, "
        "kernel.apparmor_restrict_unprivileged_userns=0, or a container with --privileged); "
        "only reward kind code needs it",
    )


def check_packages() -> Check:
    """The versions of the libraries that compute."""
    names = ("torch", "transformers", "prefect", "pyarrow")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    return Check("packages", True, f"qrpo {__version__}, {found}", needed=True)


def check_devices() -> Check:
    """What models run on, and whether bfloat16 is native there."""
    import torch

    from qrpo_core.engines.numerics import native_bfloat16

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("devices", True, f"{count} x {torch.cuda.get_device_name(0)}, {gigabytes:.0f} GiB")
    how = "native" if native_bfloat16("cpu") else "computed in float32"
    return Check("devices", True, f"no GPU; {torch.get_num_threads()} CPU threads, bfloat16 {how}")


def check_vllm() -> Check:
    """Whether there is an environment with vLLM; it is not started."""
    from qrpo_core.engines.vllm_setup import interpreter, require

    try:
        require(VllmConfig())
    except ConfigError as error:
        return Check("vllm", False, error.message, "make vllm-env; only sampling.engine vllm needs it")
    return Check("vllm", True, str(interpreter(VllmConfig())))


def check_peft() -> Check:
    """Whether LoRA adapters can be trained."""
    if importlib.util.find_spec("peft") is None:
        return Check(
            "peft", False, "not installed", "pip install 'qrpo[lora]'; only training.lora_rank needs it"
        )
    return Check("peft", True, version("peft"))


#: Every check, in the order in which they are shown.
CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_vllm,
    check_peft,
    check_bubblewrap,
    check_sandbox,
)


def examine() -> list[Check]:
    """The result of every check."""
    return [check() for check in CHECKS]


def doctor_lines(checks: Sequence[Check]) -> list[str]:
    """A table of the checks, and what to do about those that failed."""
    rows = [("what", "", "found")]
    rows += [(each.name, "ok" if each.ok else "missing", each.what) for each in checks]
    lines = table(rows)
    failed = [each for each in checks if not each.ok]
    return [*lines, *([""] if failed else []), *(f"{each.name}: {each.remedy}" for each in failed)]
