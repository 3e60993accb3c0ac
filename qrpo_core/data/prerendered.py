"""Texts that carry a chat template already, whichever, as pre-rendered data sets hold them.

Here the model is not known yet, so the marks are those of the templates in use. What the policy's own
template writes is found where it is applied (`chat_template.ChatTemplate.carried`).
"""

from __future__ import annotations

import re

from qrpo_core.errors import DataError

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
#: A text that begins with an opening or ends with one, or holds the end of a turn and the next one's opening.
_CARRIED = re.compile(
    rf"\A\s*(?:{_BEGINNING}\s*)?({_OPENING})|({_OPENING})(?:<\|end_header_id\|>|<\|end_of_role\|>)?\s*\Z"
    rf"|{_END}\s*({_OPENING})"
)
_ENDED = re.compile(rf"({_END})\s*\Z")


def refuse_prerendered(text: str, what: str, source: str, *, answer: bool = False) -> None:
    """DataError at `source` for a text that carries a template; `what` is the text's name in the message.

    answer : whether it is an assistant's, which carries one also where it ends with the end of a turn.
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
