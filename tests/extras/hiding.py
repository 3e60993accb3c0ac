"""The Python of an environment that has some extras only: packages of no chosen extra are hidden.

`hidden(extras)` says what is hidden. A child process with this folder on PYTHONPATH and that in QRPO_HIDDEN
finds neither those modules nor their metadata (sitecustomize.py calls `install`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VARIABLE = "QRPO_HIDDEN"


@cache
def distributions_of() -> dict[str, list[str]]:
    """The distributions of each module that is installed here."""
    return dict(importlib.metadata.packages_distributions())


def canonical(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None) -> list[str]:
    """The requirements of pyproject.toml: those of an extra, or of the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"] if extra is None else project["optional-dependencies"][extra])


def allowed(extras: Iterable[str]) -> set[str]:
    """The distributions that pip installs for the core and these extras, if they are installed here."""
    return installed_by(text for extra in (None, *extras) for text in declared(extra))


def installed_by(requirements: Iterable[str]) -> set[str]:
    """The distributions that pip installs for these requirements, if they are installed here."""
    from packaging.requirements import Requirement

    found: set[tuple[str, str]] = set()  # a distribution, and "" or one of its extras
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonical(requirement.name)
        for each in ("", *requirement.extras):
            if (name, each) in found:
                continue
            found.add((name, each))
            if name == "qrpo":
                wanted += [(Requirement(text), "") for text in declared(each)] if each else []
                continue
            try:
                needed = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            wanted += [(Requirement(text), each) for text in needed]
    return {name for name, _ in found}


def hidden(extras: Iterable[str]) -> dict[str, list[str]]:
    """The installed modules and distributions that neither the core nor the extras need."""
    return all_but(allowed(extras))


def all_but(distributions: set[str]) -> dict[str, list[str]]:
    """The installed modules and distributions that are none of these, nor ours."""
    keep = distributions | {"qrpo", "pip", "setuptools"}
    modules = {
        module
        for module, distributions in distributions_of().items()
        if not any(canonical(each) in keep for each in distributions)
    }
    others = {canonical(each.name) for each in importlib.metadata.distributions()} - keep
    return {"modules": sorted(modules), "distributions": sorted(others)}


class _Hiding:
    """A finder of sys.meta_path that does not find what is hidden."""

    def __init__(self, finder: Any, modules: frozenset[str], distributions: frozenset[str]) -> None:
        self._finder, self._modules, self._distributions = finder, modules, distributions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self._modules:
            return None
        return self._finder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterable[Any]:
        find = getattr(self._finder, "find_distributions", None)
        for each in find(*context) if find else ():
            if canonical(each.name or "") not in self._distributions:
                yield each


def install() -> None:
    """Hide what the environment variable names from this process."""
    what = json.loads(os.environ[VARIABLE])
    modules, distributions = frozenset(what["modules"]), frozenset(what["distributions"])
    sys.meta_path[:] = [_Hiding(each, modules, distributions) for each in sys.meta_path]
