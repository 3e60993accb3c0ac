"""The flow and task runs of this process: which there were, and whether the server has heard how they ended.

Importing this module does not import Prefect.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from qrpo_core.errors import QRPOError

_TERMINAL = ["COMPLETED", "FAILED", "CANCELLED", "CRASHED"]
_OPEN = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]


class SeenRuns(logging.Handler):
    """The flow and task runs of this process, gathered from the ids on their log records.

    Task runs reach the server as events, and it cannot be asked about one that it has not heard of yet.
    Every run logs how it ended, so the loggers know them all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[str, set[str]] = {"flow_run_id": set(), "task_run_id": set()}

    def emit(self, record: logging.LogRecord) -> None:
        """Note the ids; nothing is written."""
        for name, ids in self.ids.items():
            ids |= {str(value)} if (value := getattr(record, name, None)) else set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen to Prefect's run loggers for the length of the block, and keep its console to the point."""
        from prefect.logging.handlers import PrefectConsoleHandler

        loggers = [logging.getLogger("prefect.flow_runs"), logging.getLogger("prefect.task_runs")]
        consoles = [h for h in logging.getLogger().handlers if isinstance(h, PrefectConsoleHandler)]
        with contextlib.ExitStack() as stack:
            for logger in loggers:
                logger.addHandler(self)
                stack.callback(logger.removeHandler, self)
            for console in consoles:
                console.addFilter(_worth_a_line)
                stack.callback(console.removeFilter, _worth_a_line)
            yield

    def lacking(self) -> int:
        """How many task runs the server has not yet recorded as ended."""
        from prefect.client.orchestration import get_client

        total = len(self.ids["task_run_id"])
        asked = (("flow_run_id", "flow_run_id", _OPEN, 1), ("id", "task_run_id", _TERMINAL, -1))
        with get_client(sync_client=True) as client:
            for field, name, states, sign in asked:
                ids = sorted(self.ids[name])
                for i in range(0, len(ids), 500):  # a database's limit on parameters
                    wanted = {field: {"any_": ids[i : i + 500]}, "state": {"type": {"any_": states}}}
                    answer = client.request("POST", "/task_runs/count", json={"task_runs": wanted})
                    total += sign * int(answer.json())
        return total


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Whether the console shows it. Not a QRPOError, an error of the server, or Ctrl-C: the flow raises them,
    and its caller has one line for it where Prefect has several, or a traceback, for the task and for every
    flow around it."""
    import httpx

    if not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
        return True
    told = isinstance((record.exc_info or (None, None))[1], (QRPOError, httpx.HTTPError))
    ended = ("Finished in state", "Crash detected! Execution was aborted by an interrupt")
    return not (told or record.getMessage().startswith(ended))
