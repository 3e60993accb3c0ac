"""Encode a conversation with its answer as token ids for a reward model."""

from __future__ import annotations

from typing import Any

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.models.chat_template import ChatTemplate, holds
from qrpo_core.rewards.base import RewardRequest


class Conversations:
    """Applies a classifier's own chat template to prompt and completion, without the opening of another turn.

    The ids have one BOS (or [CLS]) if the tokenizer has one: from the template, else from the tokenizer,
    together with its end (such as [SEP]). Text that looks like a control token is encoded as text in the
    prompt, and in the completion if it would end the turn (see `chat_template`).

    day : today's date for the template; see `ChatTemplate`.

    Raises ModelError for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, where: str, *, day: str | None = None) -> None:
        self._where = where
        if not tokenizer.chat_template:
            raise ModelError(
                "no chat template, which says how the model reads a conversation",
                where=where,
                remedy="put the chat_template.jinja that it was trained with beside its tokenizer",
            )
        self._template = ChatTemplate(tokenizer, where, day=day)
        bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = tokenizer("a")["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        #: Tokens that the tokenizer itself adds before and after a text.
        self._before, self._after = full[:start], full[start + len(bare) :]

    def encode(self, request: RewardRequest) -> tuple[int, ...]:
        """Return the token ids of one row.

        Raises ModelError if the template drops a turn of the prompt or writes BOS twice, DataError if it
        refuses the conversation, and ValueError if it drops or changes the completion.
        """
        turns = [{"role": role, "content": content} for role, content in request.messages]
        turns.append({"role": "assistant", "content": request.text})
        marked = self._marked(turns, request.prompt_id)
        self._check_text(self._template.unmarked(marked), turns)
        ids = self._template.tokens(marked)
        before = self._before
        if before and ids[: len(before)] != before:
            ids = [*before, *ids, *self._after]
        elif before and ids[len(before) : 2 * len(before)] == before:
            raise ModelError(
                "the chat template begins a conversation with two BOS tokens",
                where=self._where,
                remedy="remove one from the template; prompts must not carry a template already",
            )
        if not ids:
            raise ValueError("the reward model's chat template gives no tokens")
        return tuple(ids)

    def _check_text(self, text: str, turns: list[dict[str, str]]) -> None:
        for turn in turns[:-1]:
            if turn["content"].strip() not in text:
                raise ModelError(
                    f"the chat template drops or changes the {turn['role']} turn {turn['content'][:40]!r}",
                    where=self._where,
                    remedy="use a template that keeps it, or leave that turn out of the prompts",
                )
        if not holds(text, turns[-1]["content"]):
            raise ValueError("the reward model's chat template drops or changes the completion")

    def _marked(self, turns: list[dict[str, str]], prompt_id: str) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self._template.marked(turns, opening=False)
        except DataError as error:  # of this row's text
            raise ValueError(error.message) from None
        except TemplateError as error:
            raise DataError(
                f"the reward model's chat template refuses the conversation ({error})",
                where=f"prompt {prompt_id}, {self._where}",
                remedy="turns are usually system, user, assistant, user, ...; some templates take no system",
            ) from None
