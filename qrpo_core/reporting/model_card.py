"""The model card of a trained policy: its lineage and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from qrpo_core import __version__
from qrpo_core.config import Experiment
from qrpo_core.evaluation.metrics import KL_ARITHMETIC
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES
from qrpo_core.store.recipe import Recipe
from qrpo_core.training.survival import survival_text


def model_card(
    experiment: Experiment,
    recipe: Recipe,
    diagnostics: dict[str, Any],
    items: int,
    saved: Mapping[str, Any],
) -> str:
    """The model card in Markdown, with a front matter that model hubs read.

    items : number of training completions or pairs. saved : `training.survival.LogprobComparison.facts`.
    """
    name = OBJECTIVE_NAMES[experiment.objective.kind]
    front = yaml.safe_dump(
        {
            "base_model": experiment.model.path,
            "library_name": "transformers",
            "tags": [experiment.objective.kind],
        }
    )
    settings = yaml.safe_dump(experiment.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    numbers = "\n".join(f"| {name} | {value} |" for name, value in diagnostics.items())
    inputs = "\n".join(f"| {name} | `{key}` |" for name, key in recipe.inputs.items())
    return f"""---
{front}---
# {experiment.name}

Fine-tuned from `{experiment.model.path}` with {name} on {items:,} {name.items};
made by the package qrpo {__version__}.

{_log_probs(experiment)}

| made from | key |
|---|---|
| this artifact | `{recipe.key}` |
{inputs}

Saved in {saved["dtype"]}: {survival_text(saved)}.

| training data | |
|---|---|
{numbers}

```yaml
{settings}```
"""


def _log_probs(experiment: Experiment) -> str:
    """Temperature and arithmetic of the log-probs."""
    temperature, mixed = experiment.training_temperature, experiment.training.precision == "bf16"
    policy = "The policy is the model as it is, temperature 1."
    if temperature != 1:
        policy = (
            f"The policy is softmax(logits / {temperature:g}): sample it at temperature {temperature:g}. "
            "The log-ratios of the training are at that temperature."
        )
    arithmetic = "under bfloat16 autocast, where the device has it," if mixed else "in float32 arithmetic"
    return (
        f"{policy} Log-probs of the training are computed {arithmetic} and those of KL(policy || reference) "
        f"in {KL_ARITHMETIC} arithmetic."
    )
