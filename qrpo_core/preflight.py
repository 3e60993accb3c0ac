"""Everything that can be known to be wrong before anything is written or any server is started."""

from __future__ import annotations

from qrpo_core.errors import ConfigError
from qrpo_core.objective.transforms import get_transform
from qrpo_core.plan import prompt_table
from qrpo_core.rewards.registry import check_references
from qrpo_core.steps import policies, prompts
from qrpo_core.steps.workspace import Workspace


def check(workspace: Workspace) -> None:
    """Raise the error that the run would meet; return if there is none that is cheap to find.

    Looks at the model's files (not its weights), reads the prompt source unless the store has it
    already, and sees that the reward has what it checks against.
    """
    experiment = workspace.experiment
    # Training completions are references themselves and left out of their own comparison.
    needed = 1 + max(1, get_transform(experiment.objective.transform).min_references)
    if experiment.sampling.references_per_prompt < needed:
        raise ConfigError(
            f"sampling.references_per_prompt = {experiment.sampling.references_per_prompt} is too few",
            where=f"objective.transform {experiment.objective.transform!r}",
            remedy=f"set it to {needed} or more, since each completion is left out of its own references",
        )
    policies.source_of(workspace)
    table = prompt_table(workspace, prompts.recipe(workspace))
    references = zip(table["source"].to_pylist(), table["reference"].to_pylist(), strict=True)
    check_references(workspace.experiment.reward, references)
