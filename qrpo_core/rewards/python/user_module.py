"""Find and load the module of a user's reward function. A file in the working directory comes first.

A file with the name of one of our packages (`tasks.py`), or of another module that Python would find first,
is loaded under a private name, so that neither hides the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from qrpo_core.common.hashing import digest_json

#: The packages of this project, and the folder that holds them.
_OURS, _HOME = ("flows", "tasks", "qrpo_core"), Path(__file__).resolve().parents[3]


class NotFound(Exception):
    """The module does not exist."""


class NoFile(Exception):
    """The module has no file, such as a package's folder."""


def find_file(name: str) -> Path:
    """Return the file of a module (`package.module`), or the file itself (`folder/rewards.py`).

    The module is not run; packages above it are imported. Raises NotFound or NoFile.
    """
    own = _own_file(name)
    if own is not None:
        return own
    if name.endswith(".py"):
        raise NotFound(f"no file {name}")
    spec = _spec(name)
    if spec is None:
        raise NotFound("not found")
    if not spec.origin or not Path(spec.origin).is_file():
        raise NoFile(name)
    return Path(spec.origin)


def load(name: str) -> ModuleType:
    """Return the module of `find_file`, imported once. Raises what its import raises."""
    own = _own_file(name)
    if own is None or (not name.endswith(".py") and _is_found(name, own)):
        return importlib.import_module(name)
    if name.endswith(".py"):
        _importable(own.parent)
        return _load_as(own.parent, [own.stem])
    return _load_as(Path.cwd(), name.split("."))


def _own_file(name: str) -> Path | None:
    """Return the file of a module in the working directory, or None."""
    _importable(Path.cwd())
    if name.endswith(".py"):
        path = Path(name).expanduser().resolve()
        return path if path.is_file() else None
    path = Path.cwd().joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((each for each in candidates if each.is_file()), None)


def _is_found(name: str, own: Path) -> bool:
    """Whether an ordinary import loads this file."""
    try:
        spec = _spec(name)
    except ImportError:
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == own.resolve()


def _spec(name: str) -> ModuleSpec | None:
    importlib.invalidate_caches()
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module in sys.modules that has no spec
        return None


def _load_as(folder: Path, parts: list[str]) -> ModuleType:
    """Import folder/part/part/... under a private name, with its packages."""
    top, *below = parts
    private = f"qrpo_user_{digest_json(str(folder))[:8]}_{top}"
    if private not in sys.modules:
        package = folder / top
        if package.is_dir() and (below or (package / "__init__.py").is_file()):
            file = package / "__init__.py"
            spec = importlib.util.spec_from_file_location(
                private, file if file.is_file() else None, submodule_search_locations=[str(package)]
            ) or ModuleSpec(private, None, is_package=True)
            spec.submodule_search_locations = [str(package)]
        else:
            found = importlib.util.spec_from_file_location(private, folder / f"{top}.py")
            assert found is not None  # its name ends with .py
            spec = found
        module = sys.modules[private] = importlib.util.module_from_spec(spec)
        try:
            if spec.loader is not None:
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[private]
            raise
    return importlib.import_module(".".join([private, *below]))


def _importable(folder: Path) -> None:
    """Put a folder first on the import path, without hiding our own packages."""
    here = str(folder)
    if here in sys.path or ("" in sys.path and here == os.getcwd()):
        return
    for name in _OURS:
        if name not in sys.modules and (_HOME / name / "__init__.py").is_file():
            # A module that is imported already cannot be hidden.
            place = [str(_HOME / name)]
            spec = importlib.util.spec_from_file_location(
                name, _HOME / name / "__init__.py", submodule_search_locations=place
            )
            assert spec is not None  # its name ends with .py
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    sys.path.insert(0, here)
