"""A recipe names a result by everything that decides it: equal recipes mean equal results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qrpo_core.common.hashing import digest_json


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result.

    step : name of the step.
    version : integer, raised by hand when the meaning of the step's result changes.
    config : the settings that change the result, JSON-ready. No paths, batch sizes, device or worker counts.
    inputs : the keys or digests of the results that it is made from, by name.
    """

    step: str
    version: int
    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The cache key: 32 hex characters."""
        return digest_json(self.to_dict())

    @property
    def path(self) -> str:
        """Folder of this recipe's artifact in the store."""
        return f"artifacts/{self.step}/{self.key}"

    @property
    def blocks_path(self) -> str:
        """Folder of this recipe's blocks in the store."""
        return f"blocks/{self.step}/{self.key}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form that the key is the digest of."""
        return {"step": self.step, "version": self.version, "config": self.config, "inputs": self.inputs}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Recipe:
        """The recipe with this `to_dict`; TypeError or KeyError if there is none."""
        return cls(raw["step"], raw["version"], dict(raw["config"]), dict(raw["inputs"]))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The dotted names of the fields in which another recipe (its `to_dict`) differs, sorted."""
        return sorted(_differences(self.to_dict(), other, ""))


def _differences(mine: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        found: list[str] = []
        for key in mine.keys() | theirs.keys():
            found += _differences(mine.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if mine == theirs else [name]
