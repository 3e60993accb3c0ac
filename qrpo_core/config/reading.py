"""Reading experiments from files and command lines; every problem is one line with key, place and remedy."""

from __future__ import annotations

import difflib
import json
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment, Section, WeightedTerm

S = TypeVar("S", bound=Section)

#: Keys of earlier experiments and what they are called now. A key is a whole path from the top.
RENAMED_KEYS = {
    "prompts.reference_field": "prompts.ground_truth_field",
    "prompts.reference_fields": "prompts.ground_truth_fields",
    "objective.convention": "objective.tie_method",
    "vllm.memory_share": "vllm.gpu_memory_fraction",
    "training.gradient_checkpointing": "training.activation_checkpointing",
}


def load_experiment(path: Path | str, overrides: list[str] | None = None) -> Experiment:
    """The experiment in a file with `a.b=value` overrides (values are YAML).

    Raises ConfigError with the file, the key and the remedy.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no experiment file {str(path)!r}", remedy="give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read experiment {str(path)!r}: {error}") from None
    try:
        data = _yaml(text)
    except _Refused as error:
        raise ConfigError(
            f"{error.problem}{error.detail}", where=f"{path}:{error.line}", remedy=error.remedy
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(path), remedy="correct the syntax") from None
    if not isinstance(data, dict):
        raise ConfigError(
            "an experiment is a mapping of sections", where=str(path), remedy="see experiments/demo.yaml"
        )
    data.setdefault("name", file.stem)
    for override in overrides or []:
        apply_override(data, override)
    return parse_experiment(data, where=str(path))


def parse_experiment(data: dict[str, Any], where: str = "experiment") -> Experiment:
    """The experiment of a mapping; the first problem is raised as a ConfigError of one line."""
    try:
        # Strict JSON-like reading would refuse YAML lists for tuples, so plain python mode is used.
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def parse_section(section: type[S], data: dict[str, Any], where: str) -> S:
    """The section of a mapping; the first problem is raised as a ConfigError of one line."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where, section) from None


class _Refused(yaml.YAMLError):
    """YAML that is valid and hardly meant. line : from 1. detail : of the problem, where there are lines."""

    def __init__(self, problem: str, line: int, remedy: str, detail: str = "") -> None:
        super().__init__(problem)
        self.problem, self.line, self.remedy, self.detail = problem, line, remedy, detail


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys, and numbers that YAML 1.1 reads as others.

    Keys merged by `<<` may be overridden, as in YAML.
    """

    def compose_scalar_node(self, anchor: Any) -> Any:
        """The scalar as written; one in quotes is a text."""
        node = super().compose_scalar_node(anchor)
        if node.style is None and (number := _otherwise_read(node.tag, node.value)) is not None:
            raise _Refused(
                f"YAML reads {node.value} as {yaml.safe_load(node.value)}",
                node.start_mark.line + 1,
                f"write {number} for the number, or {node.value!r} in quotes for the text",
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The mapping as written, before any merge."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _Refused(
                    f"key {key.value!r} occurs twice",
                    line,
                    "keep one of the two, or merge them",
                    f": first in line {lines[name]}",
                )
            lines[name] = line
        return node


def _otherwise_read(tag: str, text: str) -> str | None:
    """What a user means by a plain scalar that YAML 1.1 reads as octal or to the base 60; None for any other.

    010 is 8 there, and 1:30 is 90.
    """
    if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return None
    if ":" in text:
        return str(yaml.safe_load(text))
    digits = text.replace("_", "").lstrip("+-")
    if not (digits.isdigit() and digits.startswith("0")) or int(digits) == int(digits, 8):
        return None
    return f"{'-' * text.startswith('-')}{int(digits)}"


def _yaml(text: str) -> Any:
    """The value of one YAML document; YAMLError if it is invalid, _Refused where it is hardly meant."""
    return yaml.load(text, Loader=_Loader)


def apply_override(data: dict[str, Any], override: str, option: str = "--set") -> None:
    """Set one field of an experiment's mapping. override : `a.b=value`, its value YAML.

    Raises ConfigError, which names the option, for text of another form.
    """
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"cannot read {option} {override!r}", remedy="write it as section.field=value")
    try:
        value = _yaml(text)
    except _Refused as error:
        raise ConfigError(error.problem, where=f"{option} {override}", remedy=error.remedy) from None
    except yaml.YAMLError:
        raise ConfigError(f"the value of {option} {override!r} is not YAML", remedy="quote it") from None
    if value == text.strip():  # not in quotes
        value = _number(value)
    place = data
    for part in parts[:-1]:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"{option} {override!r}: {part!r} is a value, not a section", remedy="see qrpo config"
            )
        place = below
    place[parts[-1]] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads 3e-5 as a string (no dot); a command line means the number, unless it is in quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _explain(error: ValidationError, where: str, section: type[Section] = Experiment) -> ConfigError:
    problems = error.errors()
    # A renamed key comes first: a missing field may be its new name.
    first = next((each for each in problems if _path(each) in RENAMED_KEYS), problems[0])
    parts = [str(part) for part in first["loc"]]
    key = _path(first) or "experiment"
    if first["type"] == "extra_forbidden":
        if key in RENAMED_KEYS:
            return ConfigError(f"{key} is now {RENAMED_KEYS[key]}", where=where, remedy="write the new name")
        known = _known_names(parts[:-1], section)
        near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return ConfigError(f"unknown key {key!r}", where=where, remedy=remedy)
    if first["type"] == "missing":
        return ConfigError(
            f"{key!r} is missing", where=where, remedy="add it; qrpo config --schema lists the fields"
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(message, where=where)
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float | date):
        message = "a text is wanted: put it in quotes (YAML reads yes, no, numbers and dates as other values)"
    return ConfigError(f"{key} = {first['input']!r} is refused", where=where, remedy=message)


def _path(problem: ErrorDetails) -> str:
    return ".".join(map(str, problem["loc"]))


def _known_names(path: list[str], section: type[Section]) -> list[str]:
    model: Any = section
    for part in path:
        if part == "terms" or part.isdigit():
            model = WeightedTerm
            continue
        field = model.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        ):
            return []
        model = field.annotation
    return list(model.model_fields)
