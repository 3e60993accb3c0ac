"""End a process with its parent. Standard library only: processes of other environments use it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int) -> None:
    """Make the system kill this process when its parent (process id) dies. On Linux; elsewhere a no-op.

    The kernel watches the *thread* that started this process. Children do not inherit the setting; it
    survives an exec.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)
