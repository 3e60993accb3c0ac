"""Results as plain values: dataclasses with a JSON form that is checked when it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from qrpo_core.common.errors import DataError


class PlainResult:
    """The base of a frozen dataclass that is stored as JSON.

    what, remedy : the words of the error for a file that does not hold one.
    """

    what: ClassVar[str]
    remedy: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        this: Any = self  # a dataclass, which a base class cannot say
        return dict(dataclasses.asdict(this))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str | None = None) -> Self:
        """The inverse of `to_dict`; raises DataError for a missing, unknown or mistyped field."""
        try:
            # Through JSON: only there does pydantic's strict mode accept a mapping for a dataclass.
            return TypeAdapter(cls).validate_json(json.dumps(dict(value)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"not {cls.what}: {key}: {first['msg']}", where=where, remedy=cls.remedy
            ) from None
