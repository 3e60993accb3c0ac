"""One family of errors; every one names the value, the place and the remedy.

QRPOError
├── ConfigError       an experiment that cannot be meant: unknown key, value out of range
├── DataError         a prompt source: missing file, unreadable row, empty, contradictory references
├── ModelError        a policy: no weights, no tokenizer, no chat template
├── EngineError       sampling or log-probabilities failed
├── ObjectiveError    numbers the objective refuses: NaN rewards, a convention without its normaliser
└── StoreError        the artifact store
    ├── MissingError      nothing under that key
    ├── AccessError       the store answered "not allowed" (never read as "absent")
    └── DamagedError      content and digest disagree
"""

from __future__ import annotations


class QRPOError(Exception):
    """Bad input or a state that the pipeline refuses.

    Parameters
    ----------
    message : what is wrong, with the offending value.
    where : the file, row, key or object it was found in.
    remedy : what the reader can do about it.

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
    """Unpickle with the keyword arguments kept (errors cross process boundaries)."""
    return kind(message, where=where, remedy=remedy)


class ConfigError(QRPOError):
    """An experiment that cannot be meant."""


class DataError(QRPOError):
    """A prompt source that cannot be read as asked."""


class ModelError(QRPOError):
    """A policy that cannot be loaded as asked."""


class EngineError(QRPOError):
    """Sampling or log-probability computation failed."""


class ObjectiveError(QRPOError):
    """Numbers that the objective refuses."""


class StoreError(QRPOError):
    """The artifact store refused or cannot answer."""


class MissingError(StoreError):
    """Nothing is stored under that key."""


class AccessError(StoreError):
    """The store answered "not allowed"; that says nothing about what is there."""


class DamagedError(StoreError):
    """Stored content and its digest disagree."""
