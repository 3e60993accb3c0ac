"""Which prompt and which completion of it is meant."""

from __future__ import annotations

from itertools import takewhile

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.errors import MissingError, QRPOError
from qrpo_core.steps.usable import LeftOut

#: Fewest characters of a prompt_id that are taken for its beginning.
SHORTEST_PREFIX = 6


def parse_query(query: str) -> tuple[str, int | None]:
    """`PROMPT[:INDEX]` as its two parts; QRPOError for anything else."""
    name, colon, text = query.partition(":")
    if colon and not (text.isascii() and text.isdigit()):
        raise QRPOError(f"{text!r} is no sample_index", where=query, remedy="write PROMPT or PROMPT:INDEX")
    if len(name) < SHORTEST_PREFIX:
        raise QRPOError(
            f"{name!r} is too short for a prompt_id",
            remedy=f"give it, or at least its first {SHORTEST_PREFIX} characters",
        )
    return name, int(text) if colon else None


def find_prompt(table: pa.Table, name: str) -> str:
    """The prompt_id that is `name` or alone begins with it. table : PROMPTS rows.

    Raises QRPOError where several do, MissingError where none does; both name some.
    """
    ids = table["prompt_id"]
    found: list[str] = ids.filter(pc.starts_with(ids, name)).to_pylist()
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
        raise QRPOError(f"{len(found)} prompts begin with {name!r}", where=some, remedy="give more of it")
    near = sorted(ids.to_pylist(), key=lambda prompt: (-_shared(prompt, name), prompt))[:3]
    raise MissingError(
        f"none of the {len(table)} prompts begins with {name!r}", remedy=f"the nearest are {', '.join(near)}"
    )


def refuse_left_out(left_out: LeftOut, name: str) -> None:
    """Raise MissingError, saying why, where `name` begins the id of a prompt that the run leaves out."""
    for problem in left_out.problems:
        prompt = problem.prompt_id or ""
        if prompt.startswith(name) and (why := left_out.why(prompt)):
            raise MissingError(
                f"prompt {prompt} is left out ({why})",
                where=problem.where,
                remedy="mend the row; prompts.on_unusable is skip",
            )


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
