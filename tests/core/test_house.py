"""The house rules that no linter checks: no module cycle, and limits on files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ("qrpo_core", "tasks", "flows")
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 350, 60


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a file may import, also inside functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import name` imports the module of that name, if there is one.
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def import_graph(paths: Iterable[Path]) -> dict[str, set[str]]:
    files = {module_name(path): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set(imported(ast.parse(path.read_text(encoding="utf-8")))) & files.keys() - {name}
        packages = {each for each in found if files[each].name == "__init__.py"}
        # A package whose submodule is named imports nothing more than the submodule does.
        graph[name] = found - {each for each in packages if any(f.startswith(f"{each}.") for f in found)}
    return graph


def test_no_module_cycle() -> None:
    try:
        TopologicalSorter(import_graph(python_files(*SOURCE))).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import one another: {' -> '.join(error.args[1])}")


def test_files_are_short() -> None:
    paths = python_files(*SOURCE, "tests", "benchmarks")
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in python_files(*SOURCE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MOST_LINES_OF_A_FUNCTION:
                    long[f"{module_name(path)}.{node.name}"] = count
    assert long == {}


def test_only_the_hashing_module_hashes() -> None:
    """Digests that name things come from one place."""
    files = [path for room in ("qrpo_core", "tasks", "flows") for path in (ROOT / room).rglob("*.py")]
    users = {path.relative_to(ROOT).as_posix() for path in files if "hashlib" in path.read_text("utf-8")}
    assert users == {"qrpo_core/common/hashing.py"}
