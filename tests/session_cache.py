"""The caches of a test session, set before anything reads the environment."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

#: Kept between test runs, and shared by them: the converted model, a database of Prefect's.
KEPT = Path(os.environ.get("QRPO_TESTS_KEPT") or Path(tempfile.gettempdir()) / "qrpo-tests")

# The user's cache is each session's own: two sessions at once must not see each other's trainings.
if "QRPO_CACHE" not in os.environ:
    os.environ["QRPO_CACHE"] = tempfile.mkdtemp(prefix="qrpo-tests-")
    atexit.register(shutil.rmtree, os.environ["QRPO_CACHE"], ignore_errors=True)
