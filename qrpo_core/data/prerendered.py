"""Refuse texts that carry the marks of a chat template already.

The model is not known here, so this module knows the marks of the common templates.
`chat_template.ChatTemplate.carried` finds the marks of the policy's own template.
"""

from __future__ import annotations

import re

from qrpo_core.common.errors import DataError

_ROLE = "(?:system|developer|user|assistant|model|tool|ipython)"
#: How templates open a turn: ChatML, Llama 3, Gemma, Granite, Command, Harmony, Phi, DeepSeek, Mistral.
_OPENING = (
    rf"(?:<\|im_start\|>\s*{_ROLE}\b|<\|start_header_id\|>\s*{_ROLE}|<start_of_turn>\s*{_ROLE}\b"
    rf"|<\|start_of_role\|>\s*{_ROLE}|<\|START_OF_TURN_TOKEN\|>|<\|start\|>\s*{_ROLE}\b|<\|{_ROLE}\|>"
    r"|<[|｜](?:User|Assistant)[|｜]>|\[INST\])"
)
_BEGINNING = (
    r"(?:<s>|<bos>|<\|begin_of_text\|>|<[|｜]begin[▁_]of[▁_]sentence[|｜]>|\[gMASK\]\s*<sop>|<\|bos\|>)"
)
_END = (
    r"(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end_of_text\|>|<\|END_OF_TURN_TOKEN\|>|<\|endoftext\|>"
    r"|<[|｜]end[▁_]of[▁_]sentence[|｜]>|<\|end\|>|<\|return\|>|<\|eos\|>)"
)
#: A text that begins or ends with an opening, or holds the end of a turn followed by an opening.
_CARRIED = re.compile(
    rf"\A\s*(?:{_BEGINNING}\s*)?({_OPENING})|({_OPENING})(?:<\|end_header_id\|>|<\|end_of_role\|>)?\s*\Z"
    rf"|{_END}\s*({_OPENING})"
)
_ENDED = re.compile(rf"({_END})\s*\Z")


def refuse_prerendered(text: str, what: str, source: str, *, answer: bool = False) -> None:
    """Raise DataError at `source` for a text that carries a template. `what` names the text in the message.

    answer : the text is an assistant's; then a mark for the end of a turn at its end is refused too.
    """
    found = _CARRIED.search(text) or (_ENDED.search(text) if answer else None)
    if found is None:
        return
    mark = next(group for group in found.groups() if group)
    raise DataError(
        f"{what} carries a chat template already ({mark})",
        where=source,
        remedy="give the text alone, a conversation as a list of messages: the template is applied here",
    )
