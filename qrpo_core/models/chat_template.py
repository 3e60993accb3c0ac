"""A chat template with fixed day and variables.

The policy and reward models use this class, so a conversation has the same tokens in every stage, on every
day and on every machine.

Control tokens in messages
--------------------------
In system and user turns, a control token is plain text: it is encoded as the characters of its name. In
assistant turns, ``<think>`` or ``<tool_call>`` are the model's own tokens. Only tokens that begin or end a
turn are spelled out there too, because as tokens they would end the turn early.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.common.hashing import prompt_id
from qrpo_core.common.thinking_marks import MARKS, THINKING, thinking_of
from qrpo_core.models.template_clock import pin_date, reads_clock, today

Messages = Sequence[Mapping[str, str]]

#: A role between the opening of a turn and its text.
_ROLE = "(?:system|developer|user|assistant|model|tool)?"
#: Contents of the turns that templates are tested with; no template writes these words.
_USER, _ANSWER, _NEXT = "Q7user", "Q7answer", "Q7next"


class ChatTemplate:
    """The chat template of a tokenizer, on one day and with the recipe's variables.

    Parameters
    ----------
    tokenizer : a tokenizer of transformers.
    where : its directory, for messages.
    day : the template's current date, YYYY-MM-DD; None is today (UTC).
    variables : further JSON values for the template, such as enable_thinking.
    ends : token ids that end a turn, besides the tokenizer's end token.

    Raises ModelError for a tokenizer without a chat template, and for a variable that the template does not
    use.
    """

    def __init__(
        self,
        tokenizer: Any,
        where: str,
        *,
        day: str | None = None,
        variables: Mapping[str, Any] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._where = tokenizer, where
        self._variables = dict(variables or {})
        if not tokenizer.chat_template:
            raise ModelError("no chat template", where=where, remedy="use an instruction-tuned model")
        try:
            self.text: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(str(error), where=where, remedy="name one of the templates 'default'") from None
        for name in self._variables:
            if not re.search(rf"\b{re.escape(name)}\b", self.text):
                raise ModelError(
                    f"the chat template does not read {name!r}",
                    where=where,
                    remedy="model.chat_template_kwargs may hold only variables that the template reads",
                )
        self._pinned = pin_date(self.text, day or today()) if reads_clock(self.text) else self.text
        self._ends = {tokenizer.convert_ids_to_tokens(token) for token in ends}

    def render(self, turns: Messages, *, opening: bool) -> str:
        """The text of a conversation. opening : whether to open the assistant's next turn.

        Raises jinja2's TemplateError if the template refuses it, DataError for values that are not strings.
        """
        for turn in turns:
            for key, value in turn.items():
                if not isinstance(value, str):
                    raise DataError(
                        f"{key} of a message is {type(value).__name__} {value!r}",
                        remedy="a message holds strings; write out dates and numbers",
                    )
        text: str = self._tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            chat_template=self._pinned,
            tokenize=False,
            add_generation_prompt=opening,
            **self._variables,
        )
        return text

    def marked(self, turns: Messages, *, opening: bool) -> str:
        """Like `render`, with marks around the control tokens that `tokens` spells out."""
        text = self.render(turns, opening=opening)
        inside = [
            {**turn, "content": self.mark(turn["content"], assistant=turn["role"] == "assistant")}
            for turn in turns
        ]
        if all(old["content"] == new["content"] for old, new in zip(turns, inside, strict=True)):
            return text
        if any(mark in turn["content"] for turn in turns for mark in self._marks):
            raise DataError(
                f"a message holds control tokens and the private character U+{ord(self._marks[0]):X} or next",
                where=f"prompt {prompt_id(turns)}",
                remedy="remove the character",
            )
        marked = self.render(inside, opening=opening)
        if self.unmarked(marked) != text:
            raise DataError(
                "the chat template changes a message that holds control tokens",
                where=f"prompt {prompt_id(turns)}",
                remedy="messages must not carry the template's own tokens; give their text alone",
            )
        return marked

    def unmarked(self, text: str) -> str:
        """The text without marks."""
        for mark in self._marks:
            text = text.replace(mark, "")
        return text

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text. Text between marks is encoded as characters, not as control tokens."""
        marked = any(mark in text for mark in self._marks) and self._has_marked(text)
        try:
            ids: list[int] = self._tokenizer(
                text, add_special_tokens=False, **({"sanitize_control_tokens": True} if marked else {})
            )["input_ids"]
        except ValueError as error:  # the tokenizer cannot encode this token's name as characters
            raise DataError(str(error), remedy="messages must not hold this text") from None
        return ids

    def _has_marked(self, text: str) -> bool:
        return re.search(f"{self._marks[0]}[^{self._marks[0]}]*{self._marks[1]}", text) is not None

    def mark(self, text: str, *, assistant: bool) -> str:
        """The text of a message with marks around the control tokens to spell out."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        pattern = self._turn_pattern if assistant else self._control_pattern
        if not pattern.search(text):
            return text
        marked: str = mark_control_tokens(text, pattern)
        return marked

    @cached_property
    def _marks(self) -> tuple[str, str]:
        """The two private characters that transformers uses as marks."""
        from transformers.utils.chat_template_utils import mark_control_tokens

        start, end = mark_control_tokens("x", re.compile("x")).split("x")
        return start, end

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        """Tokens that are plain text in system and user turns: special tokens and those in the template."""
        listed = getattr(self._tokenizer, "chat_control_tokens", None)
        return tuple(
            token.content
            for token in self._tokenizer.added_tokens_decoder.values()
            if token.special
            or (
                token.content in listed
                if listed is not None
                else token.content in self.text and not token.content.isspace()
            )
        )

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return _any_of(self._control_tokens)

    @cached_property
    def _turn_pattern(self) -> re.Pattern[str]:
        return _any_of(self.turn_tokens)

    @cached_property
    def turn_tokens(self) -> tuple[str, ...]:
        """Control tokens that begin or end turns, found by rendering three turns."""
        tokenizer = self._tokenizer
        found = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, *self._ends}
        for between in self._between:
            found.update(self._control_pattern.findall(between))
        known = set(self._control_tokens)
        return tuple(sorted(token for token in found - MARKS if token in known))

    @cached_property
    def turn_openings(self) -> tuple[str, ...]:
        """The `turn_tokens` that begin a turn."""
        tokenizer = self._tokenizer
        ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        return tuple(token for token in self.turn_tokens if token not in ends | self._closing)

    @cached_property
    def _closing(self) -> set[str]:
        """The token with which the template ends every turn; empty if it has none."""
        followed = [self._control_pattern.search(between) for between in self._between[:2]]
        firsts = {match.group() for match in followed if match and len(followed) == 2}
        # A token that follows both a user's and an assistant's turn is not a role.
        return firsts if len(firsts) == 1 else set()

    @cached_property
    def _between(self) -> list[str]:
        """The template's texts after a user's turn, after an assistant's, and around a system turn."""
        from jinja2.exceptions import TemplateError

        three = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]
        found: list[str] = []
        try:
            text = self.render(_turns(three), opening=False)
            found += _pieces(text, _USER, _ANSWER) + _pieces(text, _ANSWER, _NEXT)
            found += [text.partition(_NEXT)[2]]
        except TemplateError:
            pass  # the template refuses three turns
        try:
            text = self.render(_turns([("system", _ANSWER), ("user", _USER)]), opening=True)
            head = self._control_pattern.findall(text.partition(_ANSWER)[0])
            found += [*head[-1:], *_pieces(text, _ANSWER, _USER)]
        except TemplateError:
            pass  # the template refuses system turns
        return found

    @cached_property
    def next_turn(self) -> str | None:
        """The first control token between an assistant's turn and a next turn, or None."""
        if len(self._between) < 2:
            return None
        found = self._control_pattern.search(self._between[1])
        return found.group() if found else None

    def carried(self, text: str, *, answer: bool = False) -> str | None:
        """The control token that shows that a text already carries this template, or None.

        A text carries it if it begins or ends with the opening of a turn, or holds the end of a turn and then
        an opening; an answer also if it ends with the end of a turn. A token mentioned elsewhere is text.
        """
        opens = self.turn_openings
        opening = _any_of(opens).pattern
        end = _any_of([token for token in self.turn_tokens if token not in opens]).pattern
        forms = [
            rf"\A\s*(?:(?:{end})\s*)*({opening})",
            rf"({opening})\s*{_ROLE}\s*(?:{opening})?\s*\Z",
            rf"(?:{end})\s*({opening})",
        ]
        if answer:
            forms.append(rf"({end})\s*\Z")
        found = (re.search(form, text) for form in forms)
        return next((match.group(1) for match in found if match), None)

    def check_opening(self) -> None:
        """Raise ModelError if the template never opens the assistant's turn.

        A template needs no opening if the answer directly follows the prompt: ``[INST] Hi [/INST]``.
        """
        from jinja2.exceptions import TemplateError

        turns = _turns([("user", _USER)])
        try:
            prompt = self.render(turns, opening=True)
            if prompt != self.render(turns, opening=False):
                return
            whole = self.render([*turns, {"role": "assistant", "content": _ANSWER}], opening=False)
        except TemplateError:
            return  # the template refuses this test; it may accept other conversations
        if not (whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(_ANSWER)):
            header = whole.removeprefix(prompt).partition(_ANSWER)[0][-40:]
            raise ModelError(
                f"the chat template has no generation prompt: it writes {header!r} before an answer, and "
                "not after a prompt",
                where=self._where,
                remedy="give a template that opens the assistant's turn where add_generation_prompt is set",
            )


def holds(tail: str, text: str) -> bool:
    """Whether `tail` has the whole answer, ignoring spaces around the answer and its thinking."""
    if text.strip() in tail:
        return True
    for mark, closes in THINKING:
        thinking, answer = thinking_of(text, closes)
        before, closed, after = tail.rpartition(closes)
        if thinking is None or not closed or answer.strip() not in after:
            continue
        shown = thinking.strip().removeprefix(mark).strip()
        if before.rstrip().endswith(shown):
            opened = before.rstrip().removesuffix(shown).rstrip()
            return not opened or opened.endswith(mark)  # opened by the prompt or by the answer
    return False


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of them, longer ones first; nothing where there are none."""
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _turns(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _pieces(text: str, before: str, after: str) -> list[str]:
    """The text between two words, in a list; empty if one is missing."""
    _, found, rest = text.partition(before)
    piece, there, _ = rest.partition(after)
    return [piece] if found and there else []
