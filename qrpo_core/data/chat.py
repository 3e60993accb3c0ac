"""From conversations to token ids and back: the chat template is applied here and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qrpo_core.errors import DataError, ModelError
from qrpo_core.ids import digest_json, prompt_id
from qrpo_core.policy import load_tokenizer

Messages = Sequence[Mapping[str, str]]

#: Names that configs give to the longest sequence.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
#: Stands for any prompt where only the shape of the template matters.
_ANY_PROMPT: Messages = ({"role": "user", "content": "Hello"},)


class Chat:
    """Tokenizer and chat template of one policy.

    stop_token_ids : every id that ends a completion: the tokenizer's end token and those of
        generation_config.json and config.json. Sorted, no id twice.
    vocab_size : ids below it decode.
    max_length : longest sequence (prompt and completion together) that the model takes, in tokens.
    """

    def __init__(
        self, tokenizer: Any, *, stop_token_ids: Sequence[int], max_length: int, where: str = "tokenizer"
    ) -> None:
        self._tokenizer = tokenizer
        self._where = where
        self.stop_token_ids = tuple(sorted(set(stop_token_ids)))
        self.vocab_size = len(tokenizer)
        self.max_length = max_length
        if not self.stop_token_ids:
            raise ModelError("no end token", where=where, remedy="set eos_token_id in generation_config.json")
        if not tokenizer.chat_template:
            raise ModelError("no chat template", where=where, remedy="use an instruction-tuned model")
        bos = tokenizer.bos_token_id
        self._bos: int | None = bos
        #: Whether the tokenizer itself would begin every text with BOS.
        self._adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]

    @classmethod
    def load(cls, directory: Path | str) -> Chat:
        """The chat of a policy's directory. Loads the tokenizer and reads two JSON files, no weights."""
        folder = Path(directory)
        tokenizer = load_tokenizer(folder)
        config = _read(folder / "config.json")
        sections = [config, config.get("text_config") or {}]
        stops = [tokenizer.eos_token_id, _read(folder / "generation_config.json").get("eos_token_id")]
        stops += [section.get("eos_token_id") for section in sections]
        lengths = [section[key] for section in sections for key in _LENGTH_KEYS if section.get(key)]
        if not lengths:
            raise ModelError(
                "the longest sequence is not given",
                where=str(folder / "config.json"),
                remedy="set max_position_embeddings",
            )
        ids = [
            i for entry in stops if entry is not None for i in (entry if isinstance(entry, list) else [entry])
        ]
        return cls(tokenizer, stop_token_ids=ids, max_length=int(min(lengths)), where=str(folder))

    def prompt_token_ids(self, messages: Messages) -> tuple[int, ...]:
        """The conversation and the opening of the assistant's turn, with one BOS where the model has one.

        Text that looks like a control token (``<|im_end|>`` in a user's message) is encoded as text. Raises
        ModelError where the template refuses or drops a system turn or writes BOS twice, DataError where it
        refuses the conversation.
        """
        text = self._render(messages, opening=True)
        for turn in messages:
            if turn["role"] in ("system", "user") and turn["content"].strip() not in text:
                raise ModelError(
                    f"the chat template drops or changes the {turn['role']} turn {turn['content'][:40]!r}",
                    where=self._where,
                    remedy="use a template that keeps it, or leave that turn out of the prompts",
                )
        ids = self._encode(messages, opening=True)
        if self._bos is not None:
            if ids[:2] == [self._bos, self._bos]:
                raise ModelError(
                    "the chat template begins a prompt with two BOS tokens",
                    where=self._where,
                    remedy="remove one from the template; prompts must not carry the template already",
                )
            if self._adds_bos and ids[:1] != [self._bos]:
                ids = [self._bos, *ids]
        return tuple(ids)

    def turn_opening(self, messages: Messages) -> str:
        """What the template itself writes at the beginning of the assistant's turn, behind the prompt."""
        closed, opened = self._render(messages, opening=False), self._render(messages, opening=True)
        return opened[len(os.path.commonprefix([closed, opened])) :]  # noqa: RUF071 (characters are meant)

    def bos_count(self, token_ids: Sequence[int]) -> int:
        """How many BOS tokens a prompt holds; 0 where the model has none."""
        return sum(token == self._bos for token in token_ids)

    @property
    def template_digest(self) -> str:
        """Names the chat template."""
        return digest_json(self._tokenizer.chat_template)

    def encode_completion(self, text: str, messages: Messages = _ANY_PROMPT) -> tuple[int, ...]:
        """An answer from elsewhere as the tokens of the assistant's turn, end token included.

        Raises ModelError where the template does not write a prompt as the beginning of prompt and answer,
        does not end the turn with one of `stop_token_ids`, or changes the answer.
        """
        turns = [*messages, {"role": "assistant", "content": text}]
        prompt, whole = self._render(messages, opening=True), self._render(turns, opening=False)
        tail = whole.removeprefix(prompt)
        if not whole.startswith(prompt):
            raise self._unusable("does not begin prompt and answer with the prompt")
        if text.strip() not in tail:
            raise self._unusable(f"drops or changes the answer {text[:40]!r}")
        before, ids = self._encode(messages, opening=True), self._encode(turns, opening=False)
        if ids[: len(before)] == before:
            ids = ids[len(before) :]
        else:
            # The last token of the prompt merges with the first of the answer; a sampled answer starts anew.
            ids = self._tokenizer(tail, add_special_tokens=False)["input_ids"]
        ends = [place for place, token in enumerate(ids) if token in self.stop_token_ids]
        if not ends:
            raise self._unusable("does not end the assistant's turn with an end token")
        return tuple(ids[: ends[0] + 1])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, undecorated: no end token, no other special token, spaces as they are."""
        ids = list(token_ids)
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _unusable(self, what: str) -> ModelError:
        return ModelError(
            f"the chat template {what}",
            where=self._where,
            remedy="offline completions need another one",
        )

    def _encode(self, messages: Messages, *, opening: bool) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            add_generation_prompt=opening,
            return_dict=False,
            sanitize_control_tokens=True,
        )
        return ids

    def _render(self, messages: Messages, *, opening: bool) -> str:
        from jinja2.exceptions import TemplateError

        turns = [dict(turn) for turn in messages]
        if not turns:
            raise DataError("an empty conversation", remedy="give at least one message")

        def render(turns: list[dict[str, str]]) -> str:
            text: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=opening
            )
            return text

        try:
            return render(turns)
        except TemplateError as error:
            message = str(error)
        others = [turn for turn in turns if turn["role"] != "system"]
        if others and len(others) < len(turns):
            try:
                render(others)
            except TemplateError:
                pass  # refused without the system turn too: that turn is not the reason
            else:
                raise ModelError(
                    f"the chat template refuses a system turn ({message})",
                    where=self._where,
                    remedy="put the instruction into the user's turn, or use another model",
                )
        raise DataError(
            f"the chat template refuses the conversation ({message})",
            where=f"prompt {prompt_id(turns)}",
            remedy="turns are usually system, user, assistant, user, ...",
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where the file is absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"cannot read {path.name}: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value
