"""Presets: experiments that a team keeps in the store by name.

Layout: ``presets/<name>.json`` has every setting of the experiment. Its data files and its reward module are
in the same store (`store.inputs`), so that a preset is complete wherever the store is reached. The last one
that is saved under a name counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, MissingError, QRPOError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.form import ExperimentForm
from qrpo_core.config.reading import apply_override, load_experiment, parse_experiment, parse_section
from qrpo_core.pipeline.run_ledger import RunLedger, names_a_run
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects

#: The folder of the store.
FOLDER = "presets"
#: What the name of an experiment may be, but for the name of a YAML file.
_NAME = re.compile(r"(?!.*\.ya?ml$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Preset:
    """A preset of a store. saved : by the store's clock. problem : why it cannot be read, else ""."""

    name: str
    saved: datetime
    experiment: Experiment | None
    problem: str = ""


def save(objects: Objects, experiment: Experiment) -> bool:
    """Save an experiment, whose files are in this store, under its name; whether it replaces another.

    Raises ConfigError for a name that a command line would take for something else.
    """
    if not _NAME.fullmatch(experiment.name) or names_a_run(experiment.name):
        raise ConfigError(
            f"a preset cannot be called {experiment.name!r}: that names a file or a run",
            where="name",
            remedy="--set name=NAME",
        )
    replaces = objects.exists(_key(experiment.name))
    content = json.dumps(experiment.model_dump(mode="json"), indent=1, ensure_ascii=False)
    objects.write(_key(experiment.name), content.encode())
    return replaces


def remove(objects: Objects, name: str) -> None:
    """Remove a preset; MissingError where there is none. Its files stay: other experiments may have them."""
    if not _NAME.fullmatch(name) or not objects.exists(_key(name)):
        raise MissingError(
            f"no preset {name!r}", where=f"store {objects.url}", remedy="qrpo preset lists them"
        )
    objects.delete(_key(name))


def presets(store: StoreConfig) -> list[Preset]:
    """The presets of a store, by name."""
    objects, found = open_objects(store), []
    for entry in objects.entries(f"{FOLDER}/"):
        name = entry.key.removeprefix(f"{FOLDER}/").removesuffix(".json")
        try:
            found.append(Preset(name, entry.modified, _read(objects, store, name, ())))
        except QRPOError as error:
            found.append(Preset(name, entry.modified, None, str(error)))
    return found


def named_experiment(name: str, overrides: Sequence[str] = (), store: str | None = None) -> Experiment:
    """The experiment of a YAML file, of a run or of a preset in the store, with `a.b=value` overrides.

    store : the place of the store; None for that of the overrides, else of the YAML file, else `.qrpo`. A
    file of that name comes first. Raises ConfigError.
    """
    changes = [*overrides, *([] if store is None else [f"store.path={json.dumps(store)}"])]
    if names_a_run(name):
        return RunLedger(store_of(changes)).experiment_of(name, overrides)
    if _NAME.fullmatch(name) and not Path(name).exists():
        place = store_of(changes)
        objects = open_objects(place)
        if objects.exists(_key(name)):
            return _read(objects, place, name, overrides)
        raise ConfigError(
            f"no experiment {name!r}: no file of that name, and no preset of the store {objects.url}",
            remedy="give the path of a YAML file; qrpo preset lists presets, and --store names another store",
        )
    return load_experiment(name, changes)


def store_of(overrides: Sequence[str]) -> StoreConfig:
    """The store that overrides of `store.…` name. Raises ConfigError."""
    data: dict[str, Any] = {}
    for override in overrides:
        apply_override(data, override)
    return parse_section(StoreConfig, data.get("store", {}), "--store")


def experiment_of_form(given: dict[str, Any]) -> Experiment:
    """The experiment of a filled-in form (`config.form` says how). Raises ConfigError."""
    settings = given.get("settings")
    form = parse_section(ExperimentForm, {**given, "settings": None}, "the form")
    if settings is not None:
        data = dict(settings)
        for override in form.changes:
            apply_override(data, override, "overrides")
        return parse_experiment(data, where="settings of the form")
    if form.based_on is None:
        raise ConfigError("the form names no experiment", remedy="fill in based_on, or settings")
    changes = [each for each in form.changes if each.partition("=")[0] != "store.path"]
    return named_experiment(form.based_on, changes, form.store)


def _read(objects: Objects, store: StoreConfig, name: str, overrides: Sequence[str]) -> Experiment:
    """A preset on the store that has it, reached as `store` says; its other settings of the store stay."""
    where = f"preset {name} of {objects.url}"
    try:
        data = json.loads(objects.read(_key(name)))
        kept = dict(data["store"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"it is damaged ({error!r})", where=where, remedy="save it again") from None
    data["store"] = {**kept, **store.model_dump(mode="json", exclude_unset=True), "path": store.path}
    for override in overrides:
        apply_override(data, override)
    return parse_experiment(data, where=where)


def _key(name: str) -> str:
    return f"{FOLDER}/{name}.json"
