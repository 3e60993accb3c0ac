"""The objectives of training, one file a kind; each says everything that the project knows about it.

To add one, write a file here with a class that names its `kind`: the configuration takes its settings from
there, the trainer its loss, the pipeline its targets, the report its texts. `best_of_n.py` is a short one.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from qrpo_core.objective_kinds.base import REGISTERED, Batch, Objective, Setting

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

#: The classes by kind, in the order of their names, the default first.
KINDS: dict[str, type[Objective]] = dict(
    sorted(REGISTERED.items(), key=lambda each: (each[0] != "qrpo", each[0]))
)


def make_objective(config: Any) -> Objective:
    """The objective of an `ObjectiveConfig`."""
    return KINDS[config.kind](config)


__all__ = ["KINDS", "Batch", "Objective", "Setting", "make_objective"]
