"""The base of an experiment's sections: frozen, closed to unknown keys, with cache key marks on fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

#: Marks a field that changes speed, place or presentation, never a result.
NOT_IN_CACHE_KEY: JsonDict = {"cache_key": False}

#: Marks a field that was added later: it is part of a recipe only if it is set, so that older recipes keep
#: their keys.
IN_CACHE_KEY_IF_SET: JsonDict = {"cache_key": "if set"}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
#: Reward units a nat. Beyond these limits exp(target/beta) leaves float64, or nothing is learned.
KLStrength = Annotated[float, Field(ge=1e-8, le=1e8, allow_inf_nan=False)]
#: Of softmax(logits / temperature), in float32.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
ClosedFraction = Annotated[float, Field(ge=0, le=1)]


def _date_as_text(value: Any) -> Any:
    """The text of a date: YAML reads 2024-07-26 without quotes as one."""
    return value.isoformat() if isinstance(value, date) and not isinstance(value, datetime) else value


def _is_a_day(value: str) -> str:
    try:
        date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a day; write it as YYYY-MM-DD") from None
    return value


#: A calendar day as YYYY-MM-DD.
Day = Annotated[
    str, Field(pattern=r"^\d{4}-\d\d-\d\d$"), BeforeValidator(_date_as_text), AfterValidator(_is_a_day)
]


#: Arguments of transformers' apply_chat_template that are not variables of a template.
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
            raise ValueError(f"the pipeline sets {name}; remove it")
        try:
            kept = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ValueError(
                f"{name}: {value!r} ({type(value).__name__}) is not a JSON value; put a date in quotes"
            )
    return values


#: Variables of a chat template besides the conversation, by name: JSON values.
TemplateVariables = Annotated[dict[str, Any], AfterValidator(_for_a_template)]


#: Titles of sections in forms that do not follow from the name of the class.
_TITLES = {"Vllm": "vLLM"}


def _title(section: type) -> str:
    """The title of a section in forms: `Top up` for TopUpConfig."""
    name = section.__name__.removesuffix("Config")
    return _TITLES.get(name) or re.sub(r"(?<=[a-z])([A-Z])", r" \1", name).capitalize()


class Section(BaseModel):
    """The base of every section: frozen, closed to unknown keys, defaults validated like given values."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, model_title_generator=_title
    )


def changed_fields(section: Section) -> set[str]:
    """The fields that differ from their defaults (a form or a JSON round trip sets every field)."""
    fields = type(section).model_fields.items()
    return {name for name, field in fields if getattr(section, name) != field.get_default()}


def cache_key_fields(section: Section) -> dict[str, Any]:
    """The fields of a section that belong in a recipe: all but those marked `NOT_IN_CACHE_KEY`.

    JSON-ready; fields that are None are included, so a new field changes the recipe even if its default is
    None, unless it is marked `IN_CACHE_KEY_IF_SET`.
    """
    changed = changed_fields(section)
    kept = {
        name
        for name, field in type(section).model_fields.items()
        if (mark := _mark(field)) is None or (mark == IN_CACHE_KEY_IF_SET["cache_key"] and name in changed)
    }
    return section.model_dump(mode="json", include=kept)


def _mark(field: FieldInfo) -> object:
    """The cache key mark of a field: None, or the value of `NOT_IN_CACHE_KEY` or `IN_CACHE_KEY_IF_SET`."""
    extra = field.json_schema_extra
    return extra.get("cache_key") if isinstance(extra, dict) else None


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name; an item of a list of mappings has its place, from 0."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            value = {str(place): each for place, each in enumerate(value)}
        name = f"{above}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found
