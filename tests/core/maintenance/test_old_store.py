"""A store that an earlier version wrote is refused with one line, and stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import DamagedError, StoreError
from qrpo_core.inspection.plan import plan
from qrpo_core.maintenance.listing import listing
from qrpo_core.maintenance.verify import verify
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, precompute
from tests.core.stores import files, sweep


@pytest.mark.parametrize("kind", ["artifacts", "blocks"])
def test_a_store_of_an_earlier_version_is_refused(settings: dict[str, Any], kind: str) -> None:
    steps, _ = precompute(changed(settings))
    experiment = steps.workspace.experiment
    root = Path(experiment.store.path)
    for file in root.glob(f"{kind}/*/*/{'manifest' if kind == 'artifacts' else 'index/*'}.json"):
        raw = json.loads(file.read_text())
        file.write_text(json.dumps(raw | {"format": 1}))
    before = files(experiment)
    uses = {
        "plan": lambda: plan(Workspace(experiment)),
        "ls": lambda: listing(Workspace(experiment), everything=True),
        "verify": lambda: verify(Workspace(experiment), everything=True, repair=True),
        "gc": lambda: sweep(experiment),
        "run": lambda: precompute(changed(settings)),
    }
    for use in uses.values():
        with pytest.raises(
            StoreError, match=r"another version of qrpo wrote this store.*store\.path"
        ) as error:
            use()
        assert not isinstance(error.value, DamagedError)
        assert "\n" not in str(error.value)
    assert files(experiment) == before
