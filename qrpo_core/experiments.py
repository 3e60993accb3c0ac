"""Experiments from files and command lines: a problem is one line with the key, the place and the remedy."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qrpo_core.config import Experiment, Section, WeightedTerm
from qrpo_core.errors import ConfigError


def load_experiment(path: Path | str, overrides: list[str] | None = None) -> Experiment:
    """Read one experiment and apply `a.b=value` overrides (values are YAML).

    Raises ConfigError with the file, the key and the remedy; nothing is guessed.
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
    except _Repeated as error:
        raise ConfigError(
            f"key {error.key!r} stands twice: first in line {error.first}",
            where=f"{path}:{error.second}",
            remedy="keep one of the two, or put what is below them together",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(path), remedy="mend the syntax") from None
    if not isinstance(data, dict):
        raise ConfigError(
            "an experiment is a mapping of sections", where=str(path), remedy="see experiments/demo.yaml"
        )
    data.setdefault("name", file.stem)
    for override in overrides or []:
        _apply_override(data, override)
    return parse_experiment(data, where=str(path))


def parse_experiment(data: dict[str, Any], where: str = "experiment") -> Experiment:
    """Validate a mapping; the first problem becomes one ConfigError line."""
    try:
        # Strict JSON-like reading would refuse YAML lists for tuples, so plain python mode is used.
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


class _Repeated(yaml.YAMLError):
    """A key that a mapping has twice. first, second : its lines, from 1."""

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"key {key!r} stands twice")
        self.key, self.first, self.second = key, first, second


class _Loader(yaml.SafeLoader):
    """Safe YAML without repeated keys. What `<<` merges in may be overridden, as YAML means it."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """The mapping as it is written, before anything is merged into it."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise _Repeated(key.value, lines[name], line)
            lines[name] = line
        return node


def _yaml(text: str) -> Any:
    """The value of one YAML document; YAMLError if it is none, _Repeated for a key that stands twice."""
    return yaml.load(text, Loader=_Loader)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"cannot read --set {override!r}", remedy="write it as section.field=value")
    try:
        value = _yaml(text)
    except _Repeated as error:
        raise ConfigError(
            f"key {error.key!r} stands twice", where=f"--set {override}", remedy="keep one of the two"
        ) from None
    except yaml.YAMLError:
        raise ConfigError(f"the value of --set {override!r} is not YAML", remedy="quote it") from None
    if isinstance(value, str):
        value = _number(value)
    place = data
    for part in parts[:-1]:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"--set {override!r}: {part!r} is a value, not a section", remedy="see qrpo config"
            )
        place = below
    place[parts[-1]] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads 3e-5 as a string (no dot); a command line means the number."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts) or "experiment"
    if first["type"] == "extra_forbidden":
        known = _known_names(parts[:-1])
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
    return ConfigError(f"{key} = {first['input']!r} is refused", where=where, remedy=message)


def _known_names(path: list[str]) -> list[str]:
    model: Any = Experiment
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
