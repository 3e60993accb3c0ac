"""Read the tests of a ground truth of the reward `code`, by the format of its data set.

Nothing here runs code; tests are parsed with `ast`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from qrpo_core.rewards.code.environment import needed_modules

Format = Literal["leetcode", "mbpp", "humaneval"]

_NEEDED = {
    "leetcode": ("prompt", "entry_point", "test"),
    "humaneval": ("prompt", "entry_point", "test"),
    "mbpp": ("test_list",),
}
#: Columns with a data set's own solution. Its imports must be available too.
SOLUTIONS = ("canonical_solution", "completion", "solution", "code")
#: Columns with tests on standard input and output, which are not supported.
_STREAMS = ("input_output", "public_test_cases", "private_test_cases")


@dataclass(frozen=True, slots=True)
class Problem:
    """The tests of a ground truth, ready to run.

    tests : one source a test; each runs by itself after `examiner_setup`.
    examiner_setup : trusted source that the tests need.
    judged_setup : trusted source that runs before the program. It has no test and no expected value.
    entry : expression of the function under test (`candidate` in the tests); None for mbpp.
    names : names in the tests that the program must define (for mbpp, and if tests call the function by its
        own name).
    classes : classes of `judged_setup` whose instances are sent between the processes.
    imports : top-level modules that the ground truth cannot do without.
    """

    format: Format
    tests: tuple[str, ...]
    examiner_setup: str
    judged_setup: str
    entry: str | None
    names: tuple[str, ...]
    classes: tuple[str, ...]
    imports: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names that mark the program among the blocks of a completion: it defines one of them."""
        return (re.split(r"\W", self.entry, maxsplit=1)[0],) if self.entry else self.names


def read_problem(ground_truth: str, form: Format) -> Problem:
    """Return the problem of a ground truth. Raises ValueError for another form and says what is needed.

    leetcode, humaneval : {"prompt", "entry_point", "test": "def check(candidate): ..."}. Each statement in
        the body of `check` that asserts, itself or through a function of `test`, is a test. The other
        statements before it are its setup.
    mbpp : {"test_list" or "test_cases": [source, ...]}, optionally with "test_setup_code" (source) and
        "test_imports" (list of import statements). Each member of test_list is a test.
    Every format : `test` may also hold functions `test_...` and methods of a unittest.TestCase that call the
        program by its name, or as an import from `solution`. Each is a test.
    """
    try:
        row = json.loads(ground_truth)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a ground truth has to be a JSON object ({error})") from None
    if isinstance(row, dict) and "test_cases" in row and "test_list" not in row:
        row["test_list"] = row["test_cases"]
    needed = _NEEDED[form]
    own_functions = isinstance(row, dict) and form == "mbpp" and "test" in row and "test_list" not in row
    if not (isinstance(row, dict) and (own_functions or all(key in row for key in needed))):
        streams = isinstance(row, dict) and any(key in row for key in _STREAMS)
        raise ValueError(
            f"a ground truth of format {form} has to be a JSON object with {', '.join(needed)}"
            + ("; tests on standard input and output are not run" if streams else "")
        )
    try:
        problem = _by_name(row, form) if own_functions else None
        problem = problem or (_mbpp(row) if form == "mbpp" else _function(row, form))
        return replace(problem, imports=_imports(problem, row))
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"its code cannot be read as Python: {error}") from None


def _function(row: dict[str, Any], form: Format) -> Problem:
    prompt, entry, test = (_text(row, key) for key in ("prompt", "entry_point", "test"))
    ast.parse(entry, mode="eval")
    tree = ast.parse(test)
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if not checks and _test_functions(tree):
        return _by_name(row, form)
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise ValueError("test has to define check(candidate)")
    name = checks[0].args.args[0].arg
    setup = ast.parse(prompt)
    helpers = [node for node in tree.body if node is not checks[0] and not _calls_check(node)]
    body = (
        checks[0].body if name == "candidate" else [*ast.parse(f"{name} = candidate").body, *checks[0].body]
    )
    return Problem(
        format=form,
        tests=tuple(_split(body, _asserting(helpers))),
        examiner_setup="\n".join([prompt, *(ast.unparse(node) for node in helpers)]),
        judged_setup=prompt,
        entry=entry,
        names=(entry,) if entry in _names([ast.Module(body, [])]) else (),
        classes=_classes(setup),
    )


def _by_name(row: dict[str, Any], form: Format) -> Problem:
    """Tests that are functions and call the program by its name."""
    tree = ast.parse(_text(row, "test"))
    prompt = _text(row, "prompt") if form != "mbpp" else ""
    tests = _test_functions(tree)
    if not tests:
        raise ValueError("test defines no function test_... and no unittest.TestCase with such methods")
    of_solution = [
        node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "solution"
    ]
    body = [node for node in tree.body if node not in of_solution and not _is_main(node)]
    names = {alias.asname or alias.name for node in of_solution for alias in node.names}
    # An alias would be another name here than there; none of the data sets has one.
    if any(alias.asname for node in of_solution for alias in node.names) or "*" in names:
        raise ValueError("test imports from solution under another name")
    setup = ast.parse(prompt)
    return Problem(
        format=form,
        tests=tuple(tests),
        examiner_setup="\n".join([prompt, *(ast.unparse(node) for node in body)]),
        judged_setup=prompt,
        entry=None,
        names=tuple(sorted(names or _names([ast.Module(body, [])]) - _bound([setup]) | _entry(row))),
        classes=_classes(setup),
    )


def _entry(row: dict[str, Any]) -> set[str]:
    entry = row.get("entry_point")
    return {entry} if isinstance(entry, str) and entry.isidentifier() else set()


def _test_functions(tree: ast.Module) -> list[str]:
    """Return a statement for each test of a module: a call of test_..., or of a TestCase's method."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            if node.args.args or node.args.kwonlyargs:
                raise ValueError(f"{node.name} takes arguments: fixtures and parameters are not read")
            found.append(f"{node.name}()")
        elif isinstance(node, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in node.bases):
            methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef)]
            found += [f"{node.name}({name!r}).debug()" for name in methods if name.startswith("test")]
    return found


def _mbpp(row: dict[str, Any]) -> Problem:
    tests = _texts(row, "test_list")
    if not tests:
        raise ValueError("test_list is empty")
    setup = _text(row, "test_setup_code") if row.get("test_setup_code") else ""
    imports = "\n".join(_texts(row, "test_imports")) if row.get("test_imports") else ""
    before = ast.parse(imports + "\n" + setup)
    imported = "\n".join(
        ast.unparse(node) for node in before.body if isinstance(node, ast.Import | ast.ImportFrom)
    )
    whole = [ast.parse(setup + "\n" + test) for test in tests]
    helpers = _asserting(before.body)
    for test in tests:
        if not any(_asserts(node, helpers) for node in ast.walk(ast.parse(test))):
            raise ValueError(f"{test[:80]!r} in test_list asserts nothing")
    names = _names(whole) - _bound([ast.parse(imported)]) or _only_call(whole)
    # Tests may use a module without importing it. It must not be the program's, which could forge its values.
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


def _split(body: list[ast.stmt], helpers: set[str]) -> Iterable[str]:
    """Yield the tests in the body of `check`. Raises ValueError for a body that returns or asserts nothing.

    helpers : functions that assert.
    """
    if any(isinstance(node, ast.Return | ast.Yield) for stmt in body for node in _own_nodes(stmt)):
        raise ValueError("check(candidate) returns: its asserts cannot be run one by one")
    before: list[str] = []
    count = 0
    for statement in body:
        source = ast.unparse(statement)
        if any(_asserts(node, helpers) for node in _own_nodes(statement)):
            count += 1
            yield "\n".join([*before, source])
        else:
            before.append(source)
    if not count:
        raise ValueError("check(candidate) asserts nothing")


def _asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether a node is an assert, or calls a function that asserts.

    Such functions are `helpers`, names that begin with assert (numpy.testing), and `pytest.raises`.
    """
    match node:
        case ast.Assert():
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in helpers
        case ast.Call(func=ast.Attribute(attr=name)):
            return name.startswith("assert") or name == "raises"
    return False


def _asserting(nodes: Iterable[ast.stmt]) -> set[str]:
    """Return the functions that assert, directly or through each other."""
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    found: set[str] = set()
    while True:
        more = {f.name for f in functions if any(_asserts(node, found) for node in ast.walk(f))}
        if more <= found:
            return found
        found |= more


def _imports(problem: Problem, row: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that setup, tests and the data set's own solution need."""
    found: set[str] = set()
    for source in (problem.examiner_setup, problem.judged_setup, *problem.tests):
        found |= needed_modules(ast.parse(source))
    for key in SOLUTIONS:
        if isinstance(row.get(key), str):
            with contextlib.suppress(SyntaxError, ValueError):  # a body alone: it has no imports to see
                found |= needed_modules(ast.parse(row[key]))
    return tuple(sorted(found))


def _own_nodes(statement: ast.AST) -> Iterable[ast.AST]:
    """Yield the nodes of a statement, except those inside functions that it defines."""
    yield statement
    if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(statement):
            yield from _own_nodes(child)


def _names(trees: Iterable[ast.Module]) -> set[str]:
    """Return names that the sources read but do not bind and that are not builtin."""
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
    """Return the one builtin name that tests call, which the program redefines.

    It must be the only call. A program that could redefine the `set` or `len` that a test compares with would
    decide its own verdict.
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


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} has to be a string")
    return str(row[key])


def _texts(row: dict[str, Any], key: str) -> list[str]:
    value = row[key]
    if isinstance(value, str):  # some tables hold the list as JSON
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not (isinstance(value, list) and all(isinstance(member, str) for member in value)):
        raise ValueError(f"{key} has to be a list of strings")
    return value
