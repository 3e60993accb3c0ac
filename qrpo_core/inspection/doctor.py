"""`qrpo doctor`: checks of the machine, each with a remedy. A check changes nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from qrpo_core import __version__
from qrpo_core.common.cache_directory import TRAININGS, cache_directory
from qrpo_core.common.errors import ConfigError
from qrpo_core.common.extras import EXTRA_OF, installed
from qrpo_core.common.formatting import size
from qrpo_core.common.local_copies import FOLDERS, limit, taken
from qrpo_core.config.engines import VllmConfig
from qrpo_core.reporting.text_table import table

#: The oldest Python that the project runs on.
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    name : of the checked thing. ok : whether the check passed. what : the finding.
    remedy : how to fix it; empty if ok. needed : whether every run needs it.
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
    """Whether bubblewrap is installed; reward kind `code` runs programs in it."""
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
    """Whether the sandbox holds a program that tries to escape from it (0.3 s).

    It tries the limits on processes and memory, the network, the file system and privileges.
    """
    from qrpo_core.rewards.code.environment import own_environment
    from qrpo_core.rewards.code.sandbox.bubblewrap import modes
    from qrpo_core.rewards.code.sandbox.probe import try_mode

    if shutil.which("bwrap") is None:
        return Check("sandbox", False, "not tried without bubblewrap", "install bubblewrap")
    reasons = []
    for mode in modes():
        reason = try_mode(mode, own_environment())
        if reason is None:
            return Check("sandbox", True, f"holds ({mode})")
        reasons.append(f"{mode}: {reason}")
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
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "pyarrow"))
    return Check("packages", True, f"qrpo {__version__}, {found}", needed=True)


def check_extras() -> Check:
    """Whether the packages of the extras that add features are installed; vLLM has its own check."""
    found = {package: installed(package) for package in EXTRA_OF}
    missing = dict.fromkeys(EXTRA_OF[package] for package, there in found.items() if not there)
    if not missing:
        return Check("extras", True, ", ".join(dict.fromkeys(EXTRA_OF.values())))
    what = "without " + ", ".join(package for package, there in found.items() if not there)
    return Check("extras", False, what, f"pip install 'qrpo[{','.join(missing)}]' if you need what they do")


def check_devices() -> Check:
    """The devices for models, and whether they have native bfloat16."""
    import torch

    from qrpo_core.models.precision import native_bfloat16

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("devices", True, f"{count} x {torch.cuda.get_device_name(0)}, {gigabytes:.0f} GiB")
    how = "native" if native_bfloat16("cpu") else "computed in float32"
    return Check("devices", True, f"no GPU; {torch.get_num_threads()} CPU threads, bfloat16 {how}")


def check_vllm() -> Check:
    """Whether there is an environment with vLLM, without starting it."""
    from qrpo_core.engines.vllm_setup import interpreter, require

    try:
        require(VllmConfig())
    except ConfigError as error:
        return Check("vllm", False, error.message, "make vllm-env; only sampling.engine vllm needs it")
    return Check("vllm", True, str(interpreter(VllmConfig())))


def check_cache() -> Check:
    """What the cache directory takes of the disk."""
    cache = cache_directory()
    copies = sum(taken(cache / folder) for folder in FOLDERS)
    try:
        most = limit()
    except ConfigError as error:
        return Check("cache", False, f"{error.where}: {error.message}", error.remedy or "")
    found = (
        f"{size(copies)} of at most {size(round(most))} of copies, "
        f"{size(taken(cache / TRAININGS))} of trainings that have not ended, in {cache}"
    )
    return Check("cache", True, found)


#: Every check, in the order in which they are shown.
CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_packages,
    check_extras,
    check_devices,
    check_vllm,
    check_bubblewrap,
    check_sandbox,
    check_cache,
)


def examine() -> list[Check]:
    """The result of every check."""
    return [check() for check in CHECKS]


def doctor_lines(checks: Sequence[Check]) -> list[str]:
    """A table of the checks, and the remedies of the failed ones."""
    rows = [("what", "", "found")]
    rows += [(each.name, "ok" if each.ok else "missing", each.what) for each in checks]
    lines = table(rows)
    failed = [each for each in checks if not each.ok]
    return [*lines, *([""] if failed else []), *(f"{each.name}: {each.remedy}" for each in failed)]
