"""The short form of an experiment, which the UI shows for a deployment's parameter `experiment`.

It is a command line: `based_on` is the experiment of `qrpo run`, `store` its `--store`, and every other field
a `--set` of the setting that is its title. In this order: `settings`, or else what `based_on` names; then the
fields that are filled in; then `overrides`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from qrpo_core.config.experiment import Experiment
from qrpo_core.config.objective import ObjectiveKind
from qrpo_core.config.rewards import Kind
from qrpo_core.config.section import KLStrength, PositiveFloat, PositiveInt, Section


def _empty_boxes(schema: dict[str, Any]) -> None:
    """Show a field that may be left out as one empty box, not as a choice of two; keep the order of fields.

    PostgreSQL keeps no order of keys, which is why each field has a position.
    """
    for position, (name, field) in enumerate(schema["properties"].items()):
        field["position"] = position
        if name != "settings":
            (kind,) = (each for each in field.pop("anyOf", [{}]) if each.get("type") != "null")
            field |= kind
            del field["default"]


class ExperimentForm(Section):
    """An experiment by what it is based on and what is changed."""

    model_config = ConfigDict(json_schema_extra=_empty_boxes)

    based_on: str | None = Field(
        None,
        title="based_on",
        description="A preset or a run in the store, or a YAML file of the worker's checkout. What is empty "
        "below stays as it is there.",
    )
    store: str | None = Field(
        None, title="store.path", description="Where presets, runs and all results are."
    )
    model: str | None = Field(None, title="model.path", description="Directory, hub id or .gguf file.")
    data: str | None = Field(
        None, title="prompts.path", description="Data file, of an experiment whose prompts are a file."
    )
    references: PositiveInt | None = Field(
        None,
        title="sampling.references_per_prompt",
        description="The pre-computation budget: reference completions for each training prompt.",
    )
    reward: Kind | None = Field(
        None, title="reward.kind", description="The scorer. What only this kind has goes into overrides."
    )
    objective: ObjectiveKind | None = Field(None, title="objective.kind", description="As for reward.kind.")
    beta: KLStrength | None = Field(None, title="objective.beta", description="KL strength.")
    learning_rate: PositiveFloat | None = Field(
        None, title="training.learning_rate", description="Peak of the schedule."
    )
    overrides: tuple[Annotated[str, Field(pattern=r"^\s*\w+(\.\w+)*\s*=")], ...] = Field(
        (),
        title="overrides",
        description="Any setting, one a line: section.field=VALUE, as --set has it. They come last.",
    )
    settings: Experiment | None = Field(
        None, title="settings", description="A whole experiment, in place of based_on."
    )

    @property
    def changes(self) -> list[str]:
        """What is filled in, as `a.b=VALUE` in the order in which it is applied."""
        fields = type(self).model_fields
        filled = {
            str(fields[name].title): value
            for name in fields
            if "." in str(fields[name].title) and (value := getattr(self, name)) is not None
        }
        return [*(f"{setting}={json.dumps(value)}" for setting, value in filled.items()), *self.overrides]


def whole(experiment: Experiment) -> dict[str, Any]:
    """The form with every setting of an experiment, as JSON values."""
    return {"settings": experiment.model_dump(mode="json")}
