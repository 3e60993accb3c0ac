"""Convert conversations to token ids and back. Only this module applies a policy's chat template to rows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.common.hashing import digest_json, prompt_id
from qrpo_core.common.thinking_marks import MARKS, THINKING, thinking_of
from qrpo_core.models.chat_template import ChatTemplate, Messages, holds
from qrpo_core.models.loading import load_tokenizer
from qrpo_core.models.source import read_json_object

#: Config keys for the longest sequence.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
#: A prompt for callers that need only the template's form.
_ANY_PROMPT: Messages = ({"role": "user", "content": "Hello"},)


class Chat:
    """Tokenizer and chat template of one policy.

    stop_token_ids : every id that ends a completion: the tokenizer's end token and those in
        generation_config.json and config.json. Sorted and unique.
    vocab_size : ids below it can be decoded.
    max_length : longest sequence (prompt and completion) that the model takes, in tokens.
    day, variables : see `ChatTemplate`.
    marks : marks of thinking, besides the known ones, that decoded completions keep.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_token_ids: Sequence[int],
        max_length: int,
        where: str = "tokenizer",
        day: str | None = None,
        variables: Mapping[str, Any] | None = None,
        marks: Set[str] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = MARKS | marks
        self._where = where
        self.stop_token_ids = tuple(sorted(set(stop_token_ids)))
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        if not self.stop_token_ids:
            raise ModelError("no end token", where=where, remedy="set eos_token_id in generation_config.json")
        self._template = ChatTemplate(
            tokenizer, where, day=day, variables=variables, ends=self.stop_token_ids
        )
        self._checked = False
        bos = tokenizer.bos_token_id
        self._bos: int | None = bos
        #: Whether the tokenizer puts BOS before every text.
        self._adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        day: str | None = None,
        variables: Mapping[str, Any] | None = None,
        marks: Set[str] = frozenset(),
    ) -> Chat:
        """The chat of a policy's directory. Loads the tokenizer and two JSON files, no weights."""
        folder = Path(directory)
        tokenizer = load_tokenizer(folder)
        config = _read(folder / "config.json")
        sections = [config, config.get("text_config") or {}]
        stops = [tokenizer.eos_token_id, _read(folder / "generation_config.json").get("eos_token_id")]
        stops += [section.get("eos_token_id") for section in sections]
        lengths = [section[key] for section in sections for key in _LENGTH_KEYS if section.get(key)]
        if not lengths:
            raise ModelError(
                "the config gives no longest sequence",
                where=str(folder / "config.json"),
                remedy="set max_position_embeddings",
            )
        ids = [
            i for entry in stops if entry is not None for i in (entry if isinstance(entry, list) else [entry])
        ]
        return cls(
            tokenizer,
            stop_token_ids=ids,
            max_length=int(min(lengths)),
            where=str(folder),
            day=day,
            variables=variables,
            marks=marks,
        )

    def check(self) -> None:
        """Raise ModelError if the template never opens the assistant's turn."""
        if not self._checked:
            self._template.check_opening()
            self._checked = True

    def prompt_token_ids(self, messages: Messages) -> tuple[int, ...]:
        """Token ids of the conversation and of the opening of the answer, with one BOS if the model has it.

        Control tokens in messages are encoded as described in `chat_template`. Raises DataError naming the
        prompt if the template refuses the conversation or changes a system or user turn, or if a turn
        already carries the template; ModelError if the template has no generation prompt or writes BOS twice.
        """
        self.check()
        text = self._render(messages, opening=True)
        for turn in messages:
            self._refuse_carried(turn["role"], turn["content"], messages)
            if turn["role"] != "assistant" and not self._within(turn["content"], text):
                raise self._unusable(
                    f"drops or changes the {turn['role']} turn {turn['content'][:40]!r}",
                    messages,
                    "use a template that keeps it, or leave that turn out of the prompts",
                )
        return tuple(self._with_bos(self._encode(messages, opening=True)))

    def turn_opening(self, messages: Messages) -> str:
        """The text that the template writes to open the assistant's turn."""
        closed, opened = self._render(messages, opening=False), self._render(messages, opening=True)
        return opened[len(os.path.commonprefix([closed, opened])) :]  # noqa: RUF071 (characters are meant)

    def bos_count(self, token_ids: Sequence[int]) -> int:
        """The number of BOS tokens in a prompt; 0 if the model has no BOS."""
        return sum(token == self._bos for token in token_ids)

    @property
    def template_digest(self) -> str:
        """Digest of the chat template."""
        return digest_json(self._tokenizer.chat_template)

    def encode_completion(self, text: str, messages: Messages = _ANY_PROMPT) -> tuple[int, ...]:
        """An answer from a data set as the tokens of the assistant's turn, including the end token.

        The tokens continue those of `prompt_token_ids`. Usually they are what the template writes after the
        prompt; some templates write an empty block of thinking there. If the prompt ends by opening the
        thinking and the template leaves thinking out of answers, the answer's own thinking continues the
        prompt, and an answer without thinking closes it at once.

        Raises DataError naming the prompt if the answer already carries the template, or if the template
        changes the answer or does not start with the prompt; ModelError if the template has no generation
        prompt or does not end the turn with one of `stop_token_ids`.
        """
        self.check()
        self._refuse_carried("answer", text, messages)
        prompt = self._marked(messages, opening=True)
        opened = _opened(prompt)
        if opened is not None and text.lstrip().startswith(opened.mark) and opened.closes not in text:
            raise DataError(
                f"the answer opens its thinking with {opened.mark} and never closes it",
                where=f"prompt {prompt_id(messages)}",
                remedy=f"close it with {opened.closes} before the answer, or leave the row out",
            )
        whole = self._answered(messages, text)
        if whole.startswith(prompt):
            tail = whole.removeprefix(prompt)
            if not holds(self._template.unmarked(tail), self._template.unmarked(text)):
                raise self._unusable(f"drops or changes the answer {text[:40]!r}", messages)
        elif opened is not None:
            tail = self._continue_thinking(text, messages, opened)
        else:
            raise self._unusable("does not begin prompt and answer with the prompt", messages)
        return self._until_end(self._following(prompt, tail))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion without special tokens, with spaces unchanged.

        Marks of thinking stay even if they are special tokens, because rewards grade the text after them.
        """
        ids = list(token_ids)
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        dropped, shown = self._special
        marked = any(token in shown for token in ids)
        text: str = self._tokenizer.decode(
            [token for token in ids if token not in dropped] if marked else ids,
            skip_special_tokens=not marked,
            clean_up_tokenization_spaces=False,
        )
        return text

    @cached_property
    def _special(self) -> tuple[set[int], set[int]]:
        """The special tokens that texts leave out, and those that they show."""
        tokenizer = self._tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
        shown = {number for number, token in added if token.content.strip() in self._marks} & special
        return special - shown, shown

    @cached_property
    def _next_turn(self) -> int | None:
        """The end token of templates that write it only before a next turn (GLM), else None."""
        token = self._template.next_turn
        number = None if token is None else self._tokenizer.convert_tokens_to_ids(token)
        return number if number in self.stop_token_ids else None

    def _continue_thinking(self, text: str, messages: Messages, opened: _Opened) -> str:
        """The marked text of an answer after a prompt that opens the thinking."""
        thinking, answer = thinking_of(text, opened.closes)
        whole = self._answered(messages, answer)
        if not whole.startswith(opened.head):
            raise self._unusable("does not begin prompt and answer with the prompt", messages)
        tail = whole.removeprefix(opened.head)
        if not self._within(answer, tail):
            raise self._unusable(f"drops or changes the answer {answer[:40]!r}", messages)
        if thinking is None:
            line = "\n" if "\n" in opened.space else ""
            return f"{line}{opened.closes}{2 * line}{tail}"
        thinking = thinking.lstrip().removeprefix(opened.mark) if opened.mark in thinking else thinking
        thinking = self._template.mark(thinking.removeprefix(opened.space), assistant=True)
        between = answer[: len(answer) - len(answer.lstrip())]
        return f"{thinking}{opened.closes}{between}{tail.lstrip()}"

    def _answered(self, messages: Messages, answer: str) -> str:
        return self._marked([*messages, {"role": "assistant", "content": answer}], opening=False)

    def _following(self, prompt: str, tail: str) -> list[int]:
        """The tokens of `tail` after `prompt`; both are marked texts."""
        before, ids = self._template.tokens(prompt), self._template.tokens(prompt + tail)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        # The prompt's last token would merge with the answer's first; in sampling they are separate.
        return self._template.tokens(tail)

    def _until_end(self, ids: Sequence[int]) -> tuple[int, ...]:
        ends = [place for place, token in enumerate(ids) if token in self.stop_token_ids]
        if ends:
            return tuple(ids[: ends[0] + 1])
        if self._next_turn is not None:
            return (*ids, self._next_turn)
        raise ModelError(
            "the chat template does not end the assistant's turn with an end token",
            where=self._where,
            remedy="offline completions need another one",
        )

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos is None:
            return ids
        if ids[:2] == [self._bos, self._bos]:
            raise ModelError(
                "the chat template begins a prompt with two BOS tokens",
                where=self._where,
                remedy="remove one from the template; prompts must not carry the template already",
            )
        return [self._bos, *ids] if self._adds_bos and ids[:1] != [self._bos] else ids

    def _within(self, content: str, text: str) -> bool:
        """Whether a text holds the content of a message, ignoring spaces around it."""
        unmarked = self._template.unmarked
        return unmarked(content).strip() in unmarked(text)

    def _refuse_carried(self, role: str, text: str, messages: Messages) -> None:
        token = self._template.carried(text, answer=role in ("answer", "assistant"))
        if token is not None:
            what = "answer" if role == "answer" else f"{role} turn"
            raise DataError(
                f"the {what} {text.strip()[:40]!r} carries the chat template already ({token})",
                where=f"prompt {prompt_id(messages)}",
                remedy="give the text alone; the template is applied to it here",
            )

    def _unusable(
        self, what: str, messages: Messages, remedy: str = "give it another form, or leave the row out"
    ) -> DataError:
        return DataError(
            f"the chat template {what}", where=f"prompt {prompt_id(messages)}, {self._where}", remedy=remedy
        )

    def _encode(self, messages: Messages, *, opening: bool) -> list[int]:
        return self._template.tokens(self._marked(messages, opening=opening))

    def _render(self, messages: Messages, *, opening: bool) -> str:
        return self._template.unmarked(self._marked(messages, opening=opening))

    def _marked(self, messages: Messages, *, opening: bool) -> str:
        """The marked text of a conversation. Raises DataError if the template refuses it."""
        from jinja2.exceptions import TemplateError

        if not messages:
            raise DataError("an empty conversation", remedy="give at least one message")
        try:
            return self._template.marked(messages, opening=opening)
        except TemplateError as error:
            message = str(error)
        others = [turn for turn in messages if turn["role"] != "system"]
        if others and len(others) < len(messages):
            try:
                self._template.render(others, opening=opening)
            except TemplateError:
                pass  # the system turn is not the reason
            else:
                raise self._unusable(
                    f"refuses a system turn ({message})",
                    messages,
                    "put the instruction into the user's turn, or use another model",
                )
        raise self._unusable(
            f"refuses the conversation ({message})",
            messages,
            "turns are usually system, user, assistant, user, ...",
        )


class _Opened:
    """A prompt that ends by opening the thinking: text before the mark, mark, space after, closing mark."""

    def __init__(self, prompt: str, mark: str, closes: str, space: str) -> None:
        self.head = prompt[: len(prompt) - len(mark) - len(space)]
        self.mark, self.closes, self.space = mark, closes, space


def _opened(prompt: str) -> _Opened | None:
    for mark, closes in THINKING:
        if (found := re.search(rf"{re.escape(mark)}(\s*)\Z", prompt)) is not None:
            return _Opened(prompt, mark, closes, found.group(1))
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    return read_json_object(path) if path.is_file() else {}
