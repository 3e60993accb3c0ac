"""The model card of a trained policy: its lineage and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from qrpo_core import __version__
from qrpo_core.config import Experiment
from qrpo_core.evaluation.saved import saved_in_words
from qrpo_core.store.recipe import Recipe


def model_card(
    experiment: Experiment, recipe: Recipe, diagnostics: dict[str, Any], saved: Mapping[str, Any]
) -> str:
    """Markdown with a front matter that model hubs read.

    saved : how much of the training is in the saved weights, `train.survival.ScoredRows.facts`.
    """
    front = yaml.safe_dump(
        {"base_model": experiment.model.path, "library_name": "transformers", "tags": ["qrpo"]}
    )
    settings = yaml.safe_dump(experiment.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    numbers = "\n".join(f"| {name} | {value} |" for name, value in diagnostics.items())
    inputs = "\n".join(f"| {name} | `{key}` |" for name, key in recipe.inputs.items())
    return f"""---
{front}---
# {experiment.name}

Fine-tuned from `{experiment.model.path}` with QRPO (Quantile Reward Policy Optimization), qrpo {__version__}.

| made from | key |
|---|---|
| this artifact | `{recipe.key}` |
{inputs}

Saved in {saved["dtype"]}: {saved_in_words(saved)}.

| training data | |
|---|---|
{numbers}

```yaml
{settings}```
"""
