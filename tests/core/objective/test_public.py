"""What importing the package costs, and that its list of names is true."""

from __future__ import annotations

import inspect
import subprocess
import sys

import qrpo_core.objective as objective


def test_every_public_name_is_there_and_has_a_docstring():
    assert objective.__all__ == sorted(
        objective.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in objective.__all__:
        value = getattr(objective, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, name


def test_targets_of_a_table_are_made_without_importing_torch_or_scipy():
    program = """
import sys
from qrpo_core.objective import calibrated_targets, get_transform, normalization_check, rank_counts
from qrpo_core.objective import reference_targets
counts = rank_counts([1.0], [0.0, 2.0], in_pool=False)
for normaliser in ("population", "finite"):
    calibrated_targets(counts, transform=get_transform("identity"), beta=0.1, normaliser=normaliser)
targets = reference_targets([0, 0], [1.0, 1.0], transform=get_transform("identity"), beta=0.1)
normalization_check(targets, [0, 0])
import qrpo_core.objective.allocation
heavy = {"torch", "scipy", "pyarrow", "transformers", "prefect", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
