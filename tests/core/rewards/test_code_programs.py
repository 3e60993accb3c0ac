"""Which part of a completion is the program."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.rewards.code.programs import Block, fenced, find_program

F = "```"
GOOD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b\n"
DRAFT = "class Solution:\n    def add(self, a, b):\n        pass\n"
DOCUMENTED = (
    'class Solution:\n    def add(self, a, b):\n        """Adds.\n\n'
    f'{F}python\nadd(1, 2)\n{F}\n        """\n        return a + b\n'
)


def block(code: str, mark: str = "python", fence: str = F, indent: str = "") -> str:
    return textwrap.indent(f"{fence}{mark}\n{code}{fence}\n", indent, lambda line: True)


@pytest.mark.parametrize(
    "text",
    [
        block(GOOD),
        "Given:\n" + block("Input: a = 1\nOutput: 3\n", "") + "Solution:\n" + block(GOOD),
        "Plan:\n" + block("read a and b\nreturn the sum\n", "") + block(GOOD),
        "Example:\n" + block("print(Solution().add(1, 2))\n") + block(GOOD),
        block(GOOD) + "Try it:\n" + block("print(Solution().add(1, 2))\n"),
        block(GOOD)
        + "Tests:\n"
        + block("from solution import Solution\n\ndef test_add():\n    assert Solution()\n"),
        block(GOOD) + block(">>> class Solution: pass\n>>> Solution().add(1, 2)\n3\n"),
        block(GOOD) + block("3\n", ""),
        block(GOOD) + block("class Solution {\n}\n", "java"),
        block("pip install x\n", "bash") + block(GOOD),
        block(DRAFT) + "That returns nothing. Corrected:\n" + block(GOOD),
        block(DRAFT, "") + block(GOOD, ""),
        block(GOOD) + "It has the form\n" + block("class Solution:\n    def add(self, a, b):\n"),
        block(GOOD) + "It has the form\n" + block("class Solution:\n    def add(self, a, b):\n        ...\n"),
        block(GOOD) + "Template:\n" + block("class Solution:\n    def add(self, a, b): pass\n"),
        "\ufeff" + GOOD,
        block(GOOD) + "It was\n" + block(DRAFT, ""),  # a mark goes before a later place
        "1. Solution:\n\n" + block(GOOD, indent="   "),
        "1. Solution:\n\n" + block(GOOD, indent="    "),
        "- Solution:\n\n\t" + block(GOOD).replace("\n", "\n\t"),
        "1. " + block(GOOD).replace("\n", "\n   "),
        "> " + block(GOOD).replace("\n", "\n> ") + "\nSo it is.",
        block(GOOD, fence="~~~"),
        block(GOOD, fence="`" * 5),
        block(GOOD, "Python3"),
        block(GOOD, " py"),
        block(GOOD, "{python}"),
        block(GOOD, "{.python .numberLines}"),
        block(GOOD, "python:solution.py"),
        block(GOOD, 'python title="a.py" {1,2}'),
        block(GOOD, "src/solution.py"),
        block(textwrap.indent(GOOD, "    ")),
        block(GOOD).replace("\n", "\r\n"),
        f"{F}python\n{GOOD}",
        f"{F}python\n{GOOD}\nThis adds the numbers, as asked.\n",
        f"{F}python\n{DRAFT}\nCorrected:\n{F}python\n{GOOD}{F}",
        f"{F}python\n{GOOD.rstrip()}{F}",
        '<pre><code class="language-python">' + GOOD + "</code></pre>",
        "1. Solution:\n\n    " + block(GOOD.replace("    ", "\t")).replace("\n", "\n\t"),
        f"{F}python\n{GOOD.rstrip()}{F}\nThat is it. Then:\n" + block("print(1)\n"),
        f"Here it is: {F}python\n{GOOD}{F}\n",
        f"Use {F}add{F} as follows:\n" + block(GOOD) + f"Note that {F}b{F} is an int.",
        block(f"Text.\n\n{block(GOOD)}\nMore.\n", "markdown", "`" * 4),
        block(block(GOOD), ""),
        "<details>\n" + block(GOOD) + "</details>",
        GOOD,
        "Here is the solution.\n\n" + GOOD + "\nIt runs in constant time.\n",
        f"<code>\n{GOOD}</code>",
        "[PYTHON]\n" + GOOD + "[/PYTHON]",
    ],
)
def test_the_program(text: str) -> None:
    found = find_program(text, ("Solution",))
    assert found is not None
    assert found.expandtabs(4).strip() == GOOD.strip()


def test_a_fence_inside_a_string_closes_nothing() -> None:
    assert find_program(block(DOCUMENTED), ("Solution",)) == DOCUMENTED
    assert find_program(block(DOCUMENTED, "") + block("x\n"), ("Solution",)) == DOCUMENTED
    # But a string that has no end is none, and the draft's fence closes the draft.
    broken = 'class Solution:\n    """Adds.\n'
    assert find_program(block(broken) + "Again:\n" + block(DOCUMENTED), ("Solution",)) == DOCUMENTED


@pytest.mark.parametrize(
    ("before", "program"),
    [
        ("import math\n", "def add(a, b):\n    return math.fsum([a, b])\n"),
        (
            "from math import (\n    fsum,\n    floor as down,\n)\n",
            "def add(a, b):\n    return down(fsum([a, b]))\n",
        ),
        ("from math import *\n", "def add(a, b):\n    return fsum([a, b])\n"),
        ("def plus(a, b):\n    return a + b\n", "def add(a, b):\n    return plus(a, b)\n"),
        ("MOD: int = 7\n", "def add(a, b):\n    return (a + b) % MOD\n"),
        (
            "def add(a, b): pass\ndef plus(a, b):\n    return a + b\n",
            "def add(a, b):\n    return plus(a, b)\n",
        ),
    ],
)
def test_blocks_that_define_what_the_program_uses_are_joined(before: str, program: str) -> None:
    joined = f"{before}\n{program}"
    assert find_program(block(before) + "and\n" + block(program), ("add",)) == joined
    assert (
        find_program(block(before, "") + "and\n" + block("ls\n", "sh") + block(program), ("add",)) == joined
    )


@pytest.mark.parametrize(
    "other",
    [
        "a = 1\nprint(add(a, 2))\n",  # does something
        "a = add(1, 2)\n",  # uses the entry point
        "import os\n",  # nothing of it is used
        "def plus(x):\n    return x\n",
    ],
)
def test_other_blocks_are_not(other: str) -> None:
    program = "def plus(a, b):\n    return a + b\ndef add(a, b):\n    return plus(a, b)\n"
    assert find_program(block(other) + block(program) + block(other), ("add",)) == program


def test_what_the_tests_need_beside_the_entry_point_is_joined() -> None:
    pair, total = "class Pair: pass\n", "def total(pairs):\n    return len(pairs)\n"
    assert find_program(block(pair) + block(total), ("Pair", "total")) == f"{pair}\n{total}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (block("return a + b\n"), "return a + b\n"),
        (block("print(add(1, 2))\n") + block("    return a + b\n"), "return a + b\n"),
        ("    return a + b\n", "    return a + b\n"),
        (block("Sum\n", "") + "I cannot.", "Sum\n"),
        ("I cannot.", None),
        ("", None),
    ],
)
def test_the_body_alone_is_a_program_where_that_is_the_form(text: str, found: str | None) -> None:
    assert find_program(text, ("add",), body=True) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (block("ls\n", "bash"), None),
        ("text `x` only", None),
        ("The class Solution adds.", None),
        ("", None),
        (block("def other(): pass\n"), "def other(): pass\n"),  # wrong, and its error says why
    ],
)
def test_where_nothing_defines_the_entry_point(text: str, found: str | None) -> None:
    assert find_program(text, ("Solution",)) == found


def test_fenced_blocks() -> None:
    text = (
        block("ls\n", "bash")
        + "x\n"
        + block("y\n", "")
        + block("", "py")
        + "~~~\n```\n~~~\n"
        + "```python-repl\n1"
    )
    assert fenced(text) == [
        Block("other", "ls\n"),
        Block("", "y\n"),
        Block("python", ""),
        Block("", "```\n"),
        Block("other", "1\n"),
    ]


#: Lines of a program, at any indentation below its first line, and without fences, quotes and tabs.
BODY = st.lists(
    st.tuples(st.integers(1, 4), st.text("abx_ =+()[]:#'1.", max_size=12)).map(
        lambda p: "  " * p[0] + p[1].rstrip()
    ),
    max_size=6,
)
PROSE = st.lists(
    st.sampled_from(["", "So.", "a = 1 is `x`", "- an item", "> quoted", "1. first"]), max_size=3
)


@given(
    BODY,
    PROSE,
    PROSE,
    st.sampled_from(["python", "py", "Python3", "{python}", "python:a.py", ""]),
    st.sampled_from("`~"),
    st.integers(3, 6),
    st.sampled_from(["", " ", "   ", "    ", "        ", "> ", "> > ", ">  "]),
    st.booleans(),
)
def test_a_program_comes_out_of_its_fence_as_it_went_in(
    body: list[str],
    before: list[str],
    after: list[str],
    mark: str,
    fence: str,
    length: int,
    left: str,
    crlf: bool,
) -> None:
    program = "\n".join(["def add(a, b):", *body, "  return 1"]) + "\n"
    fenced_lines = [fence * length + mark, *program.splitlines(), fence * length]
    text = "\n".join([*before, *(left + line for line in fenced_lines), *after])
    assert find_program(text.replace("\n", "\r\n") if crlf else text, ("add",)) == textwrap.dedent(program)


@given(st.text(st.sampled_from("`~>\n \t-1.'\"#defaclsx():=import*"), max_size=300), st.booleans())
def test_every_text_has_a_program_or_none(text: str, body: bool) -> None:
    found = find_program(text, ("a", "x"), body=body)
    assert found is None or isinstance(found, str)


@pytest.mark.parametrize(
    "text",
    [
        (F + '\n"""\n' + F + "\n") * 4000,
        (F + '\n""" \'\'\' """ """\n' + F + "\n") * 4000,
        F + "python\n" + '\\"' * 50_000,
        "</a>" * 25_000 + "x",
        " " * 100_000,
        "> " * 50_000,
        "- " * 50_000 + F,
        "".join("`" * length + "\n" for length in range(300, 3, -1)),
        "".join(block(f"a{i} = a{i + 1}\n") for i in range(3000)) + block("def a(): a0\n"),
    ],
)
@pytest.mark.timeout(60)
def test_no_text_takes_for_ever(text: str) -> None:
    find_program(text, ("a",), body=True)
