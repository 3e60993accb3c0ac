"""A process that ends when its parent does. Standard library only: processes of other environments use it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent (process id) dies. Linux; elsewhere it does nothing.

    It is the death of the *thread* that started this process that counts. Children of this process do not
    inherit it; it outlasts an exec.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)
