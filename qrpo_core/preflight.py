"""Everything that can be known to be wrong before anything is written or any server is started."""

from __future__ import annotations

import pyarrow.compute as pc

from qrpo_core.errors import DataError
from qrpo_core.plan import prompt_table
from qrpo_core.rewards.registry import needs_reference
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.workspace import Workspace


def check(workspace: Workspace) -> None:
    """Raise the error that the run would meet; return if there is none that is cheap to find.

    Looks at the model's files (not its weights), reads the prompt source unless the store has it
    already, and sees that the reward has what it checks against.
    """
    policies.source_of(workspace)
    table = prompt_table(workspace, prompts.recipe(workspace))
    without = pc.sum(pc.is_null(table["reference"])).as_py()
    if without and needs_reference(workspace.experiment.reward):
        row = table.filter(pc.is_null(table["reference"])).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{without} of {len(table)} prompts have no reference, and reward {workspace.experiment.reward.kind!r} "
            "checks against one",
            where=row["source"],
            remedy="set prompts.reference_field, or use a reward that needs none",
        )
