"""Which flow and task runs this process started, and how many of them the server has not recorded as ended.

Importing this module does not import Prefect.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from qrpo_core.common.errors import QRPOError

_TERMINAL = ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]
_OPEN = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]


class RunTracker(logging.Handler):
    """Collects the ids of this process's runs from Prefect's log records.

    Task runs reach the server as events, so the server cannot be asked about one that it has not heard of.
    Prefect logs the end of every run, and its records carry the ids.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[str, set[str]] = {"flow_run_id": set(), "task_run_id": set()}

    def emit(self, record: logging.LogRecord) -> None:
        """Note the ids of a record; write nothing."""
        for name, ids in self.ids.items():
            if value := getattr(record, name, None):
                ids.add(str(value))

    @contextlib.contextmanager
    def tracking(self) -> Iterator[None]:
        """Listen to Prefect's run loggers within the block, and drop console lines that the caller prints."""
        from prefect.logging.handlers import PrefectConsoleHandler

        loggers = [logging.getLogger("prefect.flow_runs"), logging.getLogger("prefect.task_runs")]
        consoles = [h for h in logging.getLogger().handlers if isinstance(h, PrefectConsoleHandler)]
        with contextlib.ExitStack() as stack:
            for logger in loggers:
                logger.addHandler(self)
                stack.callback(logger.removeHandler, self)
            for console in consoles:
                console.addFilter(_belongs_on_console)
                stack.callback(console.removeFilter, _belongs_on_console)
            yield

    def unrecorded(self) -> int:
        """The number of task runs that the server has not yet recorded as ended."""
        from prefect.client.orchestration import get_client

        total = len(self.ids["task_run_id"])
        counts = (("flow_run_id", "flow_run_id", _OPEN, 1), ("id", "task_run_id", _TERMINAL, -1))
        with get_client(sync_client=True) as client:
            for field, name, states, sign in counts:
                ids = sorted(self.ids[name])
                for i in range(0, len(ids), 500):  # a database's limit on parameters
                    wanted = {field: {"any_": ids[i : i + 500]}, "state": {"type": {"any_": states}}}
                    answer = client.request("POST", "/task_runs/count", json={"task_runs": wanted})
                    total += sign * int(answer.json())
        return total


def _belongs_on_console(record: logging.LogRecord) -> bool:
    """False for errors that the flow raises as well: QRPOError, an HTTP error, Ctrl-C.

    The flow's caller prints one line for them. Prefect logs several, or a traceback, for the task and for
    every flow around it.
    """
    import httpx

    if not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
        return True
    raised = isinstance((record.exc_info or (None, None))[1], (QRPOError, httpx.HTTPError))
    ended = ("Finished in state", "Crash detected! Execution was aborted by an interrupt")
    return not (raised or record.getMessage().startswith(ended))
