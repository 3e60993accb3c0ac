"""The way of a sealed checkpoint into the store, beside the training."""

from __future__ import annotations

import contextvars
import logging
import threading
from pathlib import Path

from qrpo_core.common import waits
from qrpo_core.common.errors import QRPOError
from qrpo_core.store.checkpoint_store import CheckpointStore

_logger = logging.getLogger("qrpo.train")


class Uploads:
    """Puts one checkpoint after the other into the store, each in a thread of its own.

    A store that is away costs no training: the reason is logged, and the next checkpoint is put.
    """

    def __init__(self, stored: CheckpointStore) -> None:
        self._stored = stored
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, checkpoint: Path, step: int) -> None:
        """Begin to put a sealed checkpoint, whose files stay until `wait`."""
        self.wait()
        # In this context: its log lines belong to the run.
        work = contextvars.copy_context().run
        self._thread = threading.Thread(target=work, args=(self._put, checkpoint, step), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is put."""
        if self._thread is not None:
            waits.join(self._thread)
            self._thread = None

    def stop(self) -> None:
        """Put no more files, and wait for the one that is on its way."""
        self._stopped.set()
        self.wait()

    def _put(self, checkpoint: Path, step: int) -> None:
        try:
            self._stored.put(checkpoint, step, self._stopped.is_set)
        except (QRPOError, OSError) as error:
            _logger.warning(
                "%s is on this machine only, the store did not take it: %s; the next one is tried",
                checkpoint.name,
                error,
            )
