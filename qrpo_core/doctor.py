"""What a run needs of the machine, as checks that say what to do: `qrpo doctor` shows them.

A check looks and changes nothing. Others add theirs to `CHECKS`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

#: The oldest Python that the project runs on.
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    name : what, in a few words.
    ok : whether it is as it has to be.
    what : what was found.
    remedy : what to do about it; empty if ok.
    """

    name: str
    ok: bool
    what: str
    remedy: str = ""


def check_python() -> Check:
    """The version of Python."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    oldest = ".".join(str(part) for part in OLDEST_PYTHON)
    ok = sys.version_info[:2] >= OLDEST_PYTHON
    return Check("python", ok, found, "" if ok else f"install Python {oldest} or newer")


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


#: Every check, in the order in which they are shown.
CHECKS: tuple[Callable[[], Check], ...] = (check_python, check_bubblewrap, check_sandbox)


def examine() -> list[Check]:
    """The result of every check."""
    return [check() for check in CHECKS]
