"""Everything that can be known to be wrong before anything is written or any server is started."""

from __future__ import annotations

from qrpo_core.plan import prompt_table
from qrpo_core.rewards.registry import check_references
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.workspace import Workspace


def check(workspace: Workspace) -> None:
    """Raise the error that the run would meet; return if there is none that is cheap to find.

    Looks at the model's files (not its weights), reads the prompt source unless the store has it
    already, and sees that the reward has what it checks against.
    """
    policies.source_of(workspace)
    table = prompt_table(workspace, prompts.recipe(workspace))
    references = zip(table["source"].to_pylist(), table["reference"].to_pylist(), strict=True)
    check_references(workspace.experiment.reward, references)
