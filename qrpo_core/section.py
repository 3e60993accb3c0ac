"""Sections of an experiment: frozen and closed to unknown keys; which fields of them name results."""

from __future__ import annotations

import json
import re
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

#: Marks a field that changes speed, place or presentation, never a result.
Speed: JsonDict = {"recipe": False}

#: Marks a field that came later: it is part of a recipe only where it is set, so that older recipes keep
#: their names.
Later: JsonDict = {"recipe": "where set"}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
ClosedFraction = Annotated[float, Field(ge=0, le=1)]


def _written(value: Any) -> Any:
    """YAML reads 2024-07-26 without quotes as a date."""
    return value.isoformat() if isinstance(value, date) and not isinstance(value, datetime) else value


def _is_a_day(value: str) -> str:
    try:
        date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is no day; write it as YYYY-MM-DD") from None
    return value


#: A calendar day as YYYY-MM-DD.
Day = Annotated[
    str, Field(pattern=r"^\d{4}-\d\d-\d\d$"), BeforeValidator(_written), AfterValidator(_is_a_day)
]


#: Arguments of transformers' apply_chat_template that are no variables of a template.
_NOT_FOR_TEMPLATES = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length"),
        *("messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "truncation"),
    }
)


def _for_a_template(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if name in _NOT_FOR_TEMPLATES:
            raise ValueError(f"{name} is decided by the pipeline; remove it")
        try:
            kept = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ValueError(
                f"{name}: {value!r} ({type(value).__name__}) is no JSON value; a date stands in quotes"
            )
    return values


#: What a chat template is given by name besides the conversation: JSON values.
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_for_a_template)]


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

    Returns JSON-ready values; None is kept, so a new field with a None default is a visible change, unless it
    is marked `Later`.
    """
    changed = changed_fields(section)
    kept = {
        name
        for name, field in type(section).model_fields.items()
        if (mark := _mark(field)) is None or (mark == Later["recipe"] and name in changed)
    }
    return section.model_dump(mode="json", include=kept)


def _mark(field: FieldInfo) -> object:
    """What a field says of recipes: None, or the value of `Speed` or `Later`."""
    extra = field.json_schema_extra
    return extra.get("recipe") if isinstance(extra, dict) else None
