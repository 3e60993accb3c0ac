"""The files that an experiment names: those that travel with it to a worker, and where they are there.

Data files (`prompts.path`, everywhere in an experiment) and the module of a Python reward travel by their
content through the store (`store.inputs`). The module takes the modules beside it along that it imports.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.common.file_digests import file_digests
from qrpo_core.config import Experiment, ModelConfig, Section
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.config.rewards import ModelRewardConfig, PythonRewardConfig
from qrpo_core.config.section import flat
from qrpo_core.config.training import TrainingConfig
from qrpo_core.models.source import policy_digest
from qrpo_core.rewards.python.user_module import find_file
from qrpo_core.store import inputs
from qrpo_core.store.backends.interface import Objects

S = TypeVar("S", bound=Section)

#: Packages that every worker has.
_OURS = ("flows", "tasks", "qrpo_core")


@dataclass
class Carried:
    """An experiment that names no file of this machine but those in `local`.

    experiment : its data files and reward modules are addresses in the store.
    files : data file or module → the files of its folder in the store, by name.
    local : what a worker must have at the same path → its key.
    """

    experiment: Experiment
    files: dict[Path, dict[str, Path]] = field(default_factory=dict)
    local: dict[str, str] = field(default_factory=dict)


def carry(experiment: Experiment, objects: Objects, folders: Sequence[Path]) -> Carried:
    """Store the files that an experiment names, and name them there.

    folders : where a relative path is looked for, in this order. Raises ConfigError for a file that is
    missing or a module that cannot travel.
    """
    carried = Carried(experiment)
    moved = _replaced(experiment, lambda section: _carried(carried, section, folders))
    if _is_local(moved.store.path):
        store = moved.store.model_copy(update={"path": objects.url})
        moved = moved.model_copy(update={"store": store})
    carried.experiment = moved
    for files in carried.files.values():  # nothing is stored if one of them is refused
        inputs.put(objects, files)
    return carried


def _carried(carried: Carried, section: Section, folders: Sequence[Path]) -> dict[str, Any]:
    """The fields of a section that name files, as they travel; the files are noted in `carried`."""
    match section:
        case PromptsConfig(path=str(path)) if _is_local(path):
            file = _needed(path, folders, "prompts.path")
            return {"path": _address(carried, file, {file.name: file})}
        case PythonRewardConfig(file=None, function=function):
            module = _module_file(function.partition(":")[0], folders)
            if module is None:
                return {}  # of an installed package, which the worker needs as well
            return {"file": _address(carried, module, with_imports(module))}
        case ModelConfig(path=path):
            return _stays(carried, "model.path", path, folders)
        case ModelRewardConfig(path=path):
            return _stays(carried, "reward.model.path", path, folders)
        case PromptsConfig(name=str(name)):
            return _stays(carried, "prompts.name", name, folders)
        case TrainingConfig(deepspeed=str(path)):
            return _stays(carried, "training.deepspeed", path, folders)
    return {}


def by_content(experiment: Experiment) -> dict[str, str]:
    """What the files that an experiment names on this machine hold, by dotted name of the setting.

    Equal for equal files wherever they lie, and for a run that `carry` has sent. Data files and reward
    modules have the address that they would have in the store. A model and a folder of a data set have their
    name: their digests are inputs of the recipes.
    """
    folders = (Path.cwd(),)

    def change(section: Section) -> dict[str, Any]:
        try:
            found = _carried(Carried(experiment), section, folders)
            match section:
                case ModelConfig() | PromptsConfig(path=None):
                    return {key: Path(path).name for key, path in found.items()}
                case ModelRewardConfig():
                    return {
                        key: f"{Path(path).name} ({policy_digest(Path(path))[:8]})"
                        for key, path in found.items()
                    }
                case TrainingConfig():
                    return {key: _alone(Path(path)) for key, path in found.items()}
            return found
        except QRPOError:  # it cannot travel
            return _own_module(section)

    given, named = (
        flat(each.model_dump(mode="json")) for each in (experiment, _replaced(experiment, change))
    )
    return {key: value for key, value in named.items() if value != given[key]}


def _own_module(section: Section) -> dict[str, str]:
    """The file of a reward's module without what it imports, which is not found for every module."""
    if not isinstance(section, PythonRewardConfig):
        return {}
    try:
        return {"file": _alone(find_file(section.file or section.function.partition(":")[0]))}
    except Exception:  # of the user's packages, which are imported to find it
        return {}


def _alone(file: Path) -> str:
    return f"{inputs.address_of({file.name: file})}/{file.name}"


def located(experiment: Experiment, objects: Objects) -> Experiment:
    """The experiment with local paths for its files in the store. Raises MissingError and DamagedError."""

    def change(section: Section) -> dict[str, Any]:
        match section:
            case PromptsConfig(path=str(address)) if address.startswith(inputs.SCHEME):
                return {"path": str(inputs.fetch(objects, address))}
            case PythonRewardConfig(file=str(address)) if address.startswith(inputs.SCHEME):
                return {"file": str(inputs.fetch(objects, address))}
        return {}

    return _replaced(experiment, change)


def with_imports(module: Path) -> dict[str, Path]:
    """The file of a module, and of the modules and packages beside it that it imports, by name.

    Raises ConfigError for a file that is not Python and for a relative import.
    """
    files: dict[str, Path] = {}
    left = [module]
    while left:
        file = left.pop()
        if file.name in files:
            continue
        files[file.name] = file
        for name in _imported(file):
            package = module.parent / name
            if (beside := package.with_name(f"{name}.py")).is_file():
                left.append(beside)
            elif package.is_dir() and name not in _OURS:
                files |= {str(f.relative_to(module.parent)): f for f in sorted(package.rglob("*.py"))}
    return files


def _imported(file: Path) -> Iterator[str]:
    """The first parts of the names that a file imports."""
    where = str(file)
    try:
        tree = ast.parse(file.read_bytes(), where)
    except SyntaxError as error:
        raise ConfigError(f"not Python: {error.msg}", where=f"{where}:{error.lineno}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ConfigError(
                    "a relative import, whose package does not travel to a worker",
                    where=f"{where}:{node.lineno}",
                    remedy="import modules beside the file by their names, or install the package on workers",
                )
            yield (node.module or "").partition(".")[0]


def _module_file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of a reward's module that lies in one of the folders; None if it is installed."""
    if name.endswith(".py"):
        return _needed(name, folders, "reward.python.function")
    top = name.partition(".")[0]
    package = top if top != name else f"{name}/__init__.py"
    if top not in _OURS and _found(package, folders) is not None:
        raise ConfigError(
            f"{name!r} is a package beside the experiment, which does not travel to a worker",
            where="reward.python.function",
            remedy=f"name its file ({name.replace('.', '/')}.py:function), or install it on workers",
        )
    return _found(f"{name}.py", folders)


def _stays(carried: Carried, key: str, path: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The absolute path of what is too large to travel; nothing changes for an id of the hub."""
    found = _found(path, folders) if _is_local(path) else None
    if found is None:
        return {}
    carried.local[str(found)] = key
    return {key.rpartition(".")[2]: str(found)}


def _address(carried: Carried, file: Path, files: dict[str, Path]) -> str:
    carried.files[file] = files
    return f"{inputs.address_of(files)}/{file.name}"


def _is_local(path: str) -> bool:
    return "://" not in path and not path.startswith((inputs.SCHEME, "package:"))


def _needed(path: str, folders: Sequence[Path], where: str) -> Path:
    file = _found(path, folders)
    if file is None:
        places = " or ".join(sorted({str(folder) for folder in folders}))
        raise ConfigError(f"no file {path!r} in {places}", where=where, remedy="give the path of a file")
    return file


def _found(path: str, folders: Sequence[Path]) -> Path | None:
    """The existing place of a path, absolute. ConfigError where two folders have different files of it."""
    places = [Path(os.path.normpath(folder / Path(path).expanduser())) for folder in folders]
    places = [place for place in dict.fromkeys(places) if place.exists()]
    if len(set(file_digests(place for place in places if place.is_file()))) > 1:
        raise ConfigError(
            f"there are two files {path!r}: {' and '.join(map(str, places))}",
            remedy="write an absolute path, or remove one",
        )
    return places[0] if places else None


def _replaced(section: S, change: Callable[[Section], dict[str, Any]]) -> S:
    """The section with `change` applied to it and to every section below it."""
    new = {name: _value(getattr(section, name), change) for name in type(section).model_fields}
    new = {name: value for name, value in new.items() if value is not getattr(section, name)}
    new |= change(section)
    return section.model_copy(update=new) if new else section


def _value(value: Any, change: Callable[[Section], dict[str, Any]]) -> Any:
    """A field's value with its sections replaced; the same object where none is."""
    if isinstance(value, Section):
        return _replaced(value, change)
    if isinstance(value, tuple):
        items = tuple(_value(item, change) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        entries = {key: _value(item, change) for key, item in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value
