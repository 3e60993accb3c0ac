"""Find the program in a completion: choose its block, and join the blocks that it needs.

It reads lines with regular expressions in linear time: a completion can make Python's own parser take very
long.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

#: Quote marks, indentation and list markers before a fence; the fence; the text behind it.
_OPENING = re.compile(
    r"(?P<quotes>(?:[ \t]*>)*)(?P<indent>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)"
    r"(?P<fence>`{3,}|~{3,})(?P<info>.*)"
)
#: A fence behind prose on the same line, as models write it.
_GLUED_OPENING = re.compile(r"[^`]+(?P<fence>`{3,})(?P<info>[ \t]*[^`\s]+)[ \t]*")
_GLUED_CLOSING = re.compile(r"(?P<code>[^`]*[^`\s])`{3,}[ \t]*")
_PYTHON = re.compile(r"\W*(?:i?python[\d.]*|py3?)(?=$|[\s:,;{}()|=\"'\[])|\S*\w\.py\b", re.IGNORECASE)
_MARKDOWN = ("markdown", "md")
#: A comment, a string on one line, or the quotes that open a string of several lines.
_PASSED_OVER = re.compile(r"#.*|(\"\"\"|''')|\"(?:\\.|[^\"\\\n])*+\"?|'(?:\\.|[^'\\\n])*+'?")
_NAMED = re.compile(r"(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|([A-Za-z_]\w*)[ \t]*(?::[^=\n]*)?=(?!=)")
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")

_IMPORT = r"import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b"
_DEFINITION = r"(?:async[ \t]+)?def[ \t]+\w+[ \t]*[(\[]|class[ \t]+\w+[ \t]*[(:\[]|@\w"
_ASSIGNMENT = r"[A-Za-z_][\w.]*(?:\[[^\]\n]*\])?[ \t]*(?::[^=\n]*)?(?:[-+*/%&|^@]|//|\*\*|>>|<<)?=(?!=)"
_QUIET = rf"{_IMPORT}|{_DEFINITION}|{_ASSIGNMENT}|[#)\]}}]|r?\"\"\"|r?'''|if[ \t]+__name__\b"
#: A line at the left margin that only defines something, or continues a definition.
_DEFINES_ONLY = re.compile(_QUIET)
_STARTS = re.compile(rf"{_IMPORT}|{_DEFINITION}")
_STATEMENT = re.compile(
    rf"{_QUIET}|(?:if|for|while|with|try|else|elif|except|finally|match|case)\b.*[:(\[{{\\,][ \t]*(?:#.*)?$"
    r"|(?:return|raise|assert|pass|break|continue|del|global|yield|await)\b|[A-Za-z_][\w.]*\("
)
_TAGS = re.compile(
    r"^[ \t]*(?:<[a-z]+(?:[ ][^<>\n]*)?>){1,3}|</[a-z]+>(?:</[a-z]+>)?[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_SIGNATURE = re.compile(r"(?:async[ \t]+)?def\b.*:|(?:async[ \t]+)?def\b.*:[ \t]*(?:\.\.\.|pass)")
#: A line of a program whose functions are not written yet.
_SKELETON = re.compile(
    rf"{_SIGNATURE.pattern}|class\b.*:|@.*|''|\.\.\.|pass|raise[ \t]+NotImplementedError\b.*|(?:{_IMPORT}).*"
)
#: Deepest nesting of blocks in quoted Markdown.
_DEEPEST = 3
#: How many strings without an end are looked for in a text: each one reads its lines again.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    language : "python", "" if none is given, or "other".
    source : its text without quote marks and indentation.
    """

    language: Literal["python", "", "other"]
    source: str


def find_program(text: str, wanted: Sequence[str], *, body: bool = False) -> str | None:
    """Return the program in a completion, or None.

    wanted : names of the entry point; the program defines one of them.
    body : the body of the function alone is a program too.

    The first of these is the program: the last block marked as Python that defines the entry point; the last
    block without a mark that does; lines outside blocks that do; the last block marked as Python (with
    `body`, the last that is a body); the last such block without a mark. Interpreter sessions (`>>>`) and
    bare signatures count only if there is nothing else. Other blocks are joined to the program if they only
    define something and the program uses one of their names.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    blocks = [block for block in fenced(text) if block.language != "other" and not _is_session(block.source)]
    whole = [block for block in blocks if not _is_unfinished(block.source)] or blocks
    for marked in ("python", ""):
        for block in reversed(whole):
            if block.language == marked and defines(block.source, wanted):
                return _joined(block, whole, wanted)
    if bare := _unfenced(text, wanted):
        return bare
    if not blocks:
        return _unfenced_body(text) if body else None
    for marked in ("python", ""):
        for block in reversed(whole):
            if block.language == marked and (not body or _is_body(block.source)):
                return block.source
    return whole[-1].source


def fenced(text: str, depth: int = _DEEPEST) -> list[Block]:
    """Return the fenced blocks of a text, in order.

    Fences follow CommonMark: three or more backticks or tildes, also in quotes and list items. They may have
    any indentation, and may follow prose on their line if they are marked as Python. A fence inside a string
    of several lines does not close the block; a fence at the end of a line of code does. A block without a
    closing fence ends with the text, at the next block marked as Python, or before the first line that cannot
    be Python. Blocks inside Markdown, or inside a block without a language, are returned instead of the outer
    block.
    """
    lines = text.split("\n")
    found: list[Block] = []
    place, tries = 0, _TRIES
    while place < len(lines):
        opening = _opened(lines[place])
        place += 1
        if opening is None:
            continue
        inside, place, closed, tries = _inside(lines, place, opening, tries)
        source = "\n".join(inside) + "\n" if inside else ""
        nested = fenced(source, depth - 1) if depth and opening.may_nest else []
        if any(block.language == "python" for block in nested):
            found += nested
            continue
        if not closed and opening.language != "other":
            source = "\n".join(_code_of(inside)) + "\n"
        found.append(Block(opening.language, textwrap.dedent(source)))
    return found


def defines(source: str, wanted: Sequence[str]) -> bool:
    """Whether a source defines one of the names at its left margin. An import does not define."""
    return any(name in wanted for name in _defined(source))


@dataclass(frozen=True, slots=True)
class _Opening:
    fence: str
    language: Literal["python", "", "other"]
    may_nest: bool
    quotes: int
    indent: str

    def stripped(self, line: str) -> str | None:
        """Return a line of the block without the fence's indentation; None if the quotation ends."""
        if self.quotes:
            quoted = re.match(rf"(?:[ \t]*>){{{self.quotes}}} ?", line)
            if quoted is None:
                return None
            line = line[quoted.end() :]
        if "\t" in self.indent or line[: len(self.indent)].lstrip(" ")[:1] == "\t":
            return line.removeprefix(self.indent)  # a tab has no width: remove all or nothing
        blank = len(line) - len(line.lstrip(" "))
        return line[min(len(self.indent), blank) :]

    def reopens(self, line: str) -> bool:
        """Whether another block begins in a line, which ends this block without a fence."""
        found = _opened(line) if line.lstrip().startswith(self.fence) else None
        return found is not None and found.language == "python"

    def closes(self, line: str) -> bool:
        bare = line.strip()
        indent = len(line) - len(line.lstrip(" \t"))
        return indent < 4 and len(bare) >= len(self.fence) and bare == self.fence[0] * len(bare)


def _opened(line: str) -> _Opening | None:
    found = _OPENING.fullmatch(line)
    if found is not None and not (found["fence"][0] == "`" and "`" in found["info"]):
        quotes = found["quotes"].count(">")
        indent = re.sub(r"[^ \t]", " ", found["indent"].removeprefix(" " if quotes else ""))
    else:
        found = _GLUED_OPENING.fullmatch(line)
        if found is None or not _PYTHON.match(found["info"].strip()):
            return None
        quotes, indent = 0, ""
    info = found["info"].strip()
    language: Literal["python", "", "other"] = "other"
    if not info or info == "{}":
        language = ""
    elif _PYTHON.match(info):
        language = "python"
    may_nest = not info or info.lower() in _MARKDOWN
    return _Opening(found["fence"], language, may_nest, quotes, indent)


def _inside(lines: list[str], place: int, opening: _Opening, tries: int) -> tuple[list[str], int, bool, int]:
    """Return the lines of a block, the next line's number, whether it is closed, and the tries left.

    A fence inside a string of several lines does not close the block. If the string has no end, or runs over
    the opening of another block, it was no string: the first fence in it closes the block, at the cost of one
    try.
    """
    inside: list[str] = []
    first: int | None = None  # a fence that closes it, unless it is inside a string
    quote, open_within = "", False
    start = place
    python = opening.language != "other"
    while place < len(lines):
        line = opening.stripped(lines[place])
        if line is None:
            break
        place += 1
        if opening.closes(line):
            if not quote:
                return inside, place, True, tries
            first = len(inside) if first is None else first
            open_within = not open_within
        elif quote and open_within and line.lstrip().startswith(opening.fence):
            break
        elif not quote and python and opening.reopens(line):
            return inside, place - 1, False, tries
        elif (
            python
            and opening.fence[0] == "`"
            and (glued := _GLUED_CLOSING.fullmatch(line))
            and not _quote_after(glued["code"], quote)
        ):
            return [*inside, glued["code"]], place, True, tries
        inside.append(line)
        quote = _quote_after(line, quote) if python and tries else ""
    if quote and first is not None:
        return inside[:first], start + first + 1, True, tries - 1
    return inside, place, False, tries


def _quote_after(line: str, quote: str) -> str:
    """Return the quotes of the string of several lines that is open after a line, or ""."""
    place = 0
    while True:
        if quote:
            end = line.find(quote, place)
            if end < 0:
                return quote
            place, quote = end + 3, ""
        for found in _PASSED_OVER.finditer(line, place):
            if found[1]:
                place, quote = found.end(), found[1]
                break
        else:
            return ""


def _code(source: str) -> Iterator[str]:
    """Yield the lines of a source without strings and comments; "" for a line inside a string."""
    quote = ""
    for line in source.split("\n"):
        if quote:
            quote = _quote_after(line, quote)
            yield ""
            continue
        quote = _quote_after(line, "")
        yield _PASSED_OVER.sub(lambda found: "" if found[0][0] == "#" else "''", line)


def _defined(source: str) -> set[str]:
    """Return the names defined at the left margin, other than by an import."""
    found = (_NAMED.match(line) for line in _code(source))
    return {match[1] or match[2] for match in found if match}


def _imported(source: str) -> set[str]:
    names: set[str] = set()
    code = re.sub(r"\(([^()]*)\)", lambda found: found[1].replace("\n", " "), "\n".join(_code(source)))
    for found in re.finditer(r"^(?:from[ \t]+[\w.]+[ \t]+)?import[ \t]+(.+)", code, re.MULTILINE):
        for part in found[1].split(","):
            words = part.split()
            if words:
                names.add(words[-1] if "as" in words else words[0].partition(".")[0])
    return names


def _joined(block: Block, blocks: list[Block], wanted: Sequence[str]) -> str:
    """Return the block joined with the blocks that define the other names it uses."""
    place = next(number for number, other in enumerate(blocks) if other is block)
    taken = {place}
    own = _defined(block.source) | _imported(block.source)
    needed = {name for line in _code(block.source) for name in _WORD.findall(line)} | set(wanted)
    for number in [*reversed(range(place)), *range(place + 1, len(blocks))]:
        other = blocks[number].source
        brings = _defined(other) | _imported(other)
        if (brings & (needed - own) or "*" in brings) and _only_defines(other, wanted):
            taken.add(number)
            own |= brings
            needed |= {name for line in _code(other) for name in _WORD.findall(line)}
    return "\n".join(blocks[number].source for number in sorted(taken))


def _only_defines(source: str, wanted: Sequence[str]) -> bool:
    """Whether a block can run before the program: it only defines, and does not use the entry point."""
    margin = [line for line in _code(source) if line[:1].strip()]
    if not all(_DEFINES_ONLY.match(line) or line.startswith("''") for line in margin):
        return False
    used = {name for line in _code(source) for name in _WORD.findall(line)}
    return used.isdisjoint(wanted) or defines(source, wanted)


def _is_session(source: str) -> bool:
    return source.lstrip().startswith(">>>")


def _is_unfinished(source: str) -> bool:
    """Whether a block has only signatures: its last suite is missing, or all its suites are empty."""
    code = [line.strip() for line in _code(source) if line.strip()]
    if not code or code[-1].endswith(":"):
        return bool(code)
    return any(_SIGNATURE.fullmatch(line) for line in code) and all(
        _SKELETON.fullmatch(line) for line in code
    )


def _is_body(source: str) -> bool:
    return bool(re.search(r"^[ \t]*(?:return|yield)\b", "\n".join(_code(source)), re.MULTILINE))


def _code_of(lines: list[str]) -> list[str]:
    """Return the lines before the first line that cannot be Python; all lines if that is the first."""
    quote = ""
    for number, line in enumerate(lines):
        if not quote and line[:1].strip() and not _STATEMENT.match(line):
            return lines[:number] if number else lines
        quote = _quote_after(line, quote)
    return lines


def _unfenced(text: str, wanted: Sequence[str]) -> str | None:
    """Return lines of Python outside fences that define the entry point, or None."""
    names = "|".join(map(re.escape, wanted))
    text = _TAGS.sub("", text)
    start = re.search(
        rf"^([ \t]*)(?:async[ \t]+)?(?:def|class)[ \t]+(?:{names})\b[^\n]*:", text, re.MULTILINE
    )
    if not names or start is None:
        return None
    region: list[str] = []
    quote = ""
    for raw in text.split("\n"):
        line = raw.removeprefix(start[1])
        if not quote and line[:1].strip() and not (_STATEMENT if region else _STARTS).match(line):
            if defines("\n".join(region), wanted):
                break
            region = []
            continue
        if region or line[:1].strip():
            region.append(line)
            quote = _quote_after(line, quote)
    source = "\n".join(region).rstrip() + "\n"
    return source if defines(source, wanted) else None


def _unfenced_body(text: str) -> str | None:
    first = next((line for line in text.split("\n") if line.strip()), "")
    return text if first[:1] in (" ", "\t") or _is_body(first) else None
