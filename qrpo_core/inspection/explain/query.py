"""Which prompt and completion a query names."""

from __future__ import annotations

from itertools import takewhile

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import MissingError, QRPOError
from qrpo_core.pipeline.usable_rows import LeftOut

#: Fewest characters that a query accepts as the beginning of a prompt_id.
SHORTEST_PREFIX = 6


def parse_query(query: str) -> tuple[str, int | None]:
    """The two parts of `PROMPT[:INDEX]`; QRPOError for anything else."""
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
    """The only prompt_id that begins with `name`. table : PROMPTS rows.

    Raises QRPOError if several do, MissingError if none does; both name some.
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
    """Raise MissingError with the reason if the run leaves out a prompt whose id begins with `name`."""
    for problem in left_out.problems:
        prompt = problem.prompt_id or ""
        if prompt.startswith(name) and (why := left_out.why(prompt)):
            raise MissingError(
                f"prompt {prompt} is left out ({why})",
                where=problem.where,
                remedy="correct the row; prompts.on_unusable is skip",
            )


def _shared(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
