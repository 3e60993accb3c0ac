"""Sections of an experiment: frozen and closed to unknown keys; which fields of them name results."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

#: Marks a field that changes speed, place or presentation, never a result.
Speed: JsonDict = {"recipe": False}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
ClosedFraction = Annotated[float, Field(ge=0, le=1)]


#: What a form writes over a section where the name of its class says it badly.
_TITLES = {"Vllm": "vLLM"}


def _title(section: type) -> str:
    """TopUpConfig is written over its fields as `Top up`."""
    name = section.__name__.removesuffix("Config")
    return _TITLES.get(name) or re.sub(r"(?<=[a-z])([A-Z])", r" \1", name).capitalize()


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, defaults checked like given values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, model_title_generator=_title
    )


def changed_fields(section: Section) -> set[str]:
    """Fields that differ from their defaults (a form or a JSON round trip gives every field)."""
    fields = type(section).model_fields.items()
    return {name for name, field in fields if getattr(section, name) != field.get_default()}


def recipe_fields(section: Section) -> dict[str, Any]:
    """The fields of a section that belong in a recipe: all but those marked `Speed`, defaults included.

    Returns JSON-ready values; None is kept, so a new field with a None default is a visible change.
    """
    kept = {name for name, field in type(section).model_fields.items() if not _is_speed(field)}
    return section.model_dump(mode="json", include=kept)


def _is_speed(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("recipe") is False
