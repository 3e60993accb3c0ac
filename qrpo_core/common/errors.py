"""The errors of the project; each names the value, the place and the remedy.

QRPOError
├── ConfigError       an invalid experiment: unknown key, value out of range
├── DataError         a prompt source: missing file, unreadable row, empty, contradictory ground truths
├── ModelError        a policy: no weights, no tokenizer, no chat template
├── EngineError       sampling or log-probabilities failed
├── ObjectiveError    invalid numbers for the objective: NaN rewards, a tie method without its normaliser
├── CapError          the run spent its cap of GPU hours
└── StoreError        the artifact store
    ├── MissingError      nothing under that key
    ├── AccessError       the store denied access (never read as "absent")
    └── DamagedError      content and digest disagree
"""

from __future__ import annotations


class QRPOError(Exception):
    """Invalid input, or a state that the pipeline refuses.

    Parameters
    ----------
    message : what is wrong, with the offending value.
    where : the file, row, key or object with the problem.
    remedy : how the user can fix it.

    `str(error)` is one line: ``message [where]: remedy``.
    """

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message, where, remedy)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        line = self.message
        if self.where:
            line += f" [{self.where}]"
        if self.remedy:
            line += f": {self.remedy}"
        return " ".join(line.split())

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.where, self.remedy))


def _rebuild(kind: type[QRPOError], message: str, where: str | None, remedy: str | None) -> QRPOError:
    """An unpickled error with its keyword arguments (errors cross process boundaries)."""
    return kind(message, where=where, remedy=remedy)


class ConfigError(QRPOError):
    """An invalid experiment."""


class DataError(QRPOError):
    """An invalid or unreadable prompt source."""


class ModelError(QRPOError):
    """A policy that cannot be loaded."""


class EngineError(QRPOError):
    """Sampling or log-probability computation failed."""


class ObjectiveError(QRPOError):
    """Invalid numbers for the objective."""


#: The remedy where a run stopped at its cap.
GO_ON = "what is computed stays; run again to go on, or raise service.max_gpu_hours"


class CapError(QRPOError):
    """The run spent its cap of GPU hours; what is computed stays, and the next run goes on."""


class StoreError(QRPOError):
    """The store refuses a request or fails."""


class BusyError(StoreError):
    """Another run on this machine computes the same now; its result can be used when it has ended."""


class MissingError(StoreError):
    """The store has no object under the key."""


class AccessError(StoreError):
    """The store denied access; the object may exist or not."""


class DamagedError(StoreError):
    """Stored content and its digest differ."""
