"""What a completion and a reference have to be for the `code` reward: programs and tests from text.

Nothing here runs code; tests are read with `ast`.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["leetcode", "mbpp", "humaneval"]

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^`\s]*)[^`]*$")
_LANGUAGES = ("", "python", "python3", "py")
_NEEDED = {
    "leetcode": ("prompt", "entry_point", "test"),
    "humaneval": ("prompt", "entry_point", "test"),
    "mbpp": ("test_list",),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """A reference, ready to be run.

    tests : sources, one a test, each complete in itself after `examiner_setup`.
    examiner_setup : trusted source that the tests need.
    judged_setup : trusted source that the program is loaded after: no test, no expected value.
    entry : expression for the function under test (`candidate` in the tests); None for mbpp.
    names : names in the tests that the program has to define (mbpp; and the function under test where
        tests call it by its own name).
    classes : names of classes of `judged_setup`: their instances travel.
    """

    format: Format
    tests: tuple[str, ...]
    examiner_setup: str
    judged_setup: str
    entry: str | None
    names: tuple[str, ...]
    classes: tuple[str, ...]


def first_block(text: str) -> str | None:
    """The inside of the first closed fenced block of Python (```python, or no language); None without one.

    Blocks of other languages are passed over, and so is a block that is never closed.
    """
    language: str | None = None
    fence = ""
    inside: list[str] = []
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line.rstrip("\r\n"))
        if language is None:
            if found:
                fence, language = found[1], found[2].lower()
                inside = []
        elif found and not found[2] and found[1].startswith(fence):
            if language in _LANGUAGES:
                return "".join(inside)
            language = None
        else:
            inside.append(line)
    return None


def read_problem(reference: str, form: Format) -> Problem:
    """The problem of a reference. Raises ValueError, saying what is needed, for one that is not of the form.

    leetcode, humaneval : {"prompt", "entry_point", "test": "def check(candidate): ..."}; each assert in the
        body of `check` (or statement with asserts in it) is a test, the other statements before it its setup.
    mbpp : {"test_list": [source, ...]} and, if there is any, "test_setup_code" (source) and "test_imports"
        (list of import statements); each member of test_list is a test. "challenge_test_list" is not used.
    """
    try:
        row = json.loads(reference)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a reference is a JSON object ({error})") from None
    needed = _NEEDED[form]
    if not (isinstance(row, dict) and all(key in row for key in needed)):
        raise ValueError(f"a reference of format {form} is a JSON object with {', '.join(needed)}")
    try:
        return _mbpp(row) if form == "mbpp" else _function(row, form)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"its code cannot be read as Python: {error}") from None


def _function(row: dict[str, Any], form: Format) -> Problem:
    prompt, entry, test = (_text(row, key) for key in ("prompt", "entry_point", "test"))
    ast.parse(entry, mode="eval")
    tree = ast.parse(test)
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or [argument.arg for argument in checks[0].args.args] != ["candidate"]:
        raise ValueError("test has to define check(candidate)")
    setup = ast.parse(prompt)
    helpers = [node for node in tree.body if node is not checks[0] and not _calls_check(node)]
    return Problem(
        format=form,
        tests=tuple(_split(checks[0].body)),
        examiner_setup="\n".join([prompt, *(ast.unparse(node) for node in helpers)]),
        judged_setup=prompt,
        entry=entry,
        names=(entry,) if entry in _names([ast.Module(checks[0].body, [])]) else (),
        classes=_classes(setup),
    )


def _mbpp(row: dict[str, Any]) -> Problem:
    tests = _texts(row, "test_list")
    if not tests:
        raise ValueError("test_list is empty: there is nothing to pass")
    setup = _text(row, "test_setup_code") if row.get("test_setup_code") else ""
    imports = "\n".join(_texts(row, "test_imports")) if row.get("test_imports") else ""
    before = ast.parse(imports + "\n" + setup)
    imported = "\n".join(
        ast.unparse(node) for node in before.body if isinstance(node, ast.Import | ast.ImportFrom)
    )
    whole = [ast.parse(setup + "\n" + test) for test in tests]
    for test in tests:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(test))):
            raise ValueError(f"{test[:80]!r} in test_list asserts nothing")
    names = _names(whole) - _bound([ast.parse(imported)]) or _only_call(whole)
    # A module that tests use without importing it: never the program's, which could forge what it says.
    modules = {name for name in names & sys.stdlib_module_names if _is_attribute_base(name, whole)}
    names -= modules
    return Problem(
        format="mbpp",
        tests=tuple(setup + "\n" + test for test in tests),
        examiner_setup="\n".join([imported, *(f"import {module}" for module in sorted(modules))]),
        judged_setup=imported,
        entry=None,
        names=tuple(sorted(names)),
        classes=_classes(before),
    )


def _split(body: list[ast.stmt]) -> Iterable[str]:
    """The tests in the body of `check`; a statement that returns or asserts nothing at all is refused."""
    if any(isinstance(node, ast.Return | ast.Yield) for stmt in body for node in _own_nodes(stmt)):
        raise ValueError("check(candidate) returns: its asserts cannot be run one by one")
    before: list[str] = []
    count = 0
    for statement in body:
        source = ast.unparse(statement)
        if any(isinstance(node, ast.Assert) for node in _own_nodes(statement)):
            count += 1
            yield "\n".join([*before, source])
        else:
            before.append(source)
    if not count:
        raise ValueError("check(candidate) asserts nothing")


def _own_nodes(statement: ast.AST) -> Iterable[ast.AST]:
    """A statement and what is in it, without what is in functions that it defines."""
    yield statement
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(statement):
            yield from _own_nodes(child)


def _names(trees: Iterable[ast.Module]) -> set[str]:
    """Names that are read in sources and bound by none of them, nor builtin."""
    trees = list(trees)
    read = {
        node.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return {name for name in read - _bound(trees) if not hasattr(builtins, name)}


def _is_attribute_base(name: str, trees: Iterable[ast.Module]) -> bool:
    return any(
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
        for tree in trees
        for node in ast.walk(tree)
    )


def _only_call(trees: Iterable[ast.Module]) -> set[str]:
    """The one name that tests call, where all their names are builtin: the program redefines it.

    Beside a function of the program builtins stay what they are: a program that could redefine the `set`
    or the `len` that a test compares with would write its own verdict.
    """
    calls = {
        node.func.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if len(calls) != 1:
        raise ValueError("its tests call no function that a program could define")
    return calls


def _bound(trees: Iterable[ast.Module]) -> set[str]:
    bound: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    bound.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    bound.add(name)
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    bound.update((alias.asname or alias.name).partition(".")[0] for alias in aliases)
    return bound


def _classes(tree: ast.Module) -> tuple[str, ...]:
    return tuple(node.name for node in tree.body if isinstance(node, ast.ClassDef))


def _calls_check(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name(id="check"))):
            return True
    return False


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} has to be a string")
    return str(row[key])


def _texts(row: dict[str, Any], key: str) -> list[str]:
    value = row[key]
    if not (isinstance(value, list) and all(isinstance(member, str) for member in value)):
        raise ValueError(f"{key} has to be a list of strings")
    return value
