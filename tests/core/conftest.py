"""The pre-computed experiment of steps/conftest.py, also for the tests beside that folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("steps_conftest", Path(__file__).parent / "steps/conftest.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

settings = _module.settings
steps = _module.steps
