"""The environment of graded programs: an interpreter, its packages and their versions."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.rewards import CodeRewardConfig

#: Oldest Python that can run the files of the sandbox.
OLDEST = (3, 11)
#: Packages of the judges of public problem sets: right solutions may import them.
OF_PUBLIC_JUDGES = frozenset(
    {
        *("bitarray", "gmpy2", "more_itertools", "networkx", "numba", "numpy", "pandas", "regex", "scipy"),
        *("sklearn", "sortedcontainers", "sympy", "torch"),
    }
)

# Prints the packages' distributions as a whole (numpy with numpy.libs), with those that they require.
_PROBE = """
import importlib.metadata as metadata, json, pathlib, re, sys, sysconfig
name = "python" + sysconfig.get_python_version()
places = [sys.base_prefix + "/bin/" + name, getattr(sys, "_base_executable", sys.executable)]
owners = metadata.packages_distributions() if sys.argv[1:] else {}
missing = [package for package in sys.argv[1:] if package not in owners]
waiting = [owners[package][0] for package in sys.argv[1:] if package in owners]
versions, paths = {}, set()
while waiting:
    try:
        owner = metadata.distribution(waiting.pop())
    except metadata.PackageNotFoundError:
        continue  # for another system, or not needed: whether the package loads is tried
    known = owner.metadata["Name"]
    if known not in versions:
        versions[known] = owner.version
        waiting += [re.match(r"[\\w.-]+", r)[0] for r in owner.requires or () if "extra ==" not in r]
        tops = {file.parts[0] for file in owner.files or ()} - {"..", "__pycache__"}
        paths |= {str(owner.locate_file(top)) for top in tops if not top.endswith(".pth")}
print(json.dumps({
    "version": list(sys.version_info[:2]), "prefix": sys.base_prefix, "tag": sys.implementation.cache_tag,
    "executable": next(str(p.resolve()) for p in map(pathlib.Path, places) if p.exists()),
    "missing": missing, "versions": versions, "paths": sorted(p for p in paths if pathlib.Path(p).exists()),
}))
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """An interpreter, and the packages that it can import beside the standard library.

    executable : the interpreter of the base installation. prefix : the base installation.
    tag : suffix of its compiled files.
    packages : folders and files of the packages; they are mounted read-only in one folder of its path.
    versions : (name, version) of the distributions, and of Python if it is not the one that runs here.
    """

    executable: Path
    prefix: Path
    tag: str
    packages: tuple[Path, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


def find_environment(config: CodeRewardConfig) -> Environment:
    """Return the configured environment.

    Raises ConfigError if the interpreter does not exist or is too old, or a package is not installed for it.
    """
    return _found(config.python, config.packages)


def own_environment() -> Environment:
    """Return the interpreter that runs here, without packages."""
    return _found(None, ())


def environment_identity(config: CodeRewardConfig) -> dict[str, str]:
    """Return the versions of the packages that programs may import, by name.

    Raises ConfigError like `find_environment`.
    """
    return dict(find_environment(config).versions)


@lru_cache
def _found(python: str | None, packages: tuple[str, ...]) -> Environment:
    command = Path(sys.executable) if python is None else Path(python).expanduser()
    if command.is_dir():
        command = command / "bin" / "python"
    where = "reward.code.packages" if python is None else "reward.code.python"
    try:
        probe = subprocess.run(
            [str(command.absolute()), "-c", _PROBE, *packages],
            capture_output=True,
            cwd="/",  # do not import from the user's folder
            check=True,
            timeout=120,
        )
        found = json.loads(probe.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"{str(command)!r} is not a working Python interpreter ({type(error).__name__})",
            where=where,
            remedy="name the folder of a virtual environment, or its python",
        ) from None
    version = ".".join(map(str, found["version"]))
    if tuple(found["version"]) < OLDEST:
        raise ConfigError(
            f"{str(command)!r} is Python {version}",
            where=where,
            remedy=f"programs are run by Python {OLDEST[0]}.{OLDEST[1]} or newer",
        )
    if missing := found["missing"]:
        raise ConfigError(
            f"package {', '.join(map(repr, missing))} is not installed for {command}",
            where="reward.code.packages",
            remedy=f"{command} -m pip install {' '.join(missing)}, or take it off the list",
        )
    versions = found["versions"] | ({"python": version} if python is not None else {})
    return Environment(
        executable=Path(found["executable"]),
        prefix=Path(found["prefix"]).resolve(),
        tag=found["tag"],
        packages=tuple(map(Path, found["paths"])),
        versions=tuple(sorted(versions.items())),
    )


def needed_modules(node: ast.AST) -> set[str]:
    """Return the top-level modules imported in a tree, except in a `try` that handles their absence."""
    match node:
        case ast.Import(names=aliases):
            return {alias.name.partition(".")[0] for alias in aliases}
        case ast.ImportFrom(module=str(module), level=0):
            return {module.partition(".")[0]}
        case ast.Try(handlers=handlers) if any(_handles_absence(handler) for handler in handlers):
            rest: list[ast.AST] = [*handlers, *node.orelse, *node.finalbody]
            return set().union(*map(needed_modules, rest))
    return set().union(*map(needed_modules, ast.iter_child_nodes(node)))


def _handles_absence(handler: ast.ExceptHandler) -> bool:
    kinds = "" if handler.type is None else ast.unparse(handler.type)
    return not kinds or any(kind in kinds for kind in ("ImportError", "ModuleNotFoundError", "Exception"))
