"""The section `prompts`: the source of the prompts, and the form of its rows."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qrpo_core.config.section import (
    IN_CACHE_KEY_IF_SET,
    NOT_IN_CACHE_KEY,
    Day,
    PositiveInt,
    Section,
    changed_fields,
)

#: Parts of names of grades where less is often better; such a name needs a sign.
_LESS_IS_OFTEN_BETTER = frozenset(
    ("rank", "ranks", "ranking", "rankings", "loss", "losses", "error", "errors", "perplexity", "ppl")
) | frozenset(("nll", "cost", "penalty", "distance", "toxicity"))

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


class PromptExample(Section):
    """One exchange that every prompt begins with."""

    prompt: str = Field(min_length=1, description="The user turn.")
    completion: str = Field(min_length=1, description="The assistant turn that answers it.")


class PromptsConfig(Section):
    """Where prompts come from, and which are held out."""

    kind: Literal["template", "reasoning_gym", "file", "hub"] = Field(
        title="Source",
        description="The source of the prompts. Descriptions of the other fields begin with their sources.",
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2,
        description="Share of prompts kept for evaluation; decided by prompt_id, never by row order. 0 with "
        "evaluation.prompts.",
    )
    system: str | None = Field(None, description="System turn put before prompts that have none.")
    examples: tuple[PromptExample, ...] = Field(
        (),
        description="Exchanges put before each prompt, behind its system turn: examples of answers.",
        json_schema_extra=IN_CACHE_KEY_IF_SET,
    )
    limit: PositiveInt | None = Field(None, description="Take at most this many prompts, in source order.")
    date: Day | None = Field(
        None,
        description="The day that chat templates take for today, YYYY-MM-DD; null: the day (UTC) on which "
        "these prompts were first stored.",
        # A recipe holds the day where a chat template reads it.
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    on_unusable: Literal["refuse", "skip"] = Field(
        "refuse",
        description="Unusable rows (unreadable, too long for the model, refused by the chat template or by "
        "the reward): refuse to run and name them all, or leave them out and count them.",
    )
    # kind: template
    templates: tuple[str, ...] = Field((), description="template: sentences with {slots}.")
    words: dict[str, tuple[str, ...]] = Field({}, description="template: the words of each slot.")
    # kind: reasoning_gym
    task: str | None = Field(None, description="reasoning_gym: name of the task.")
    parameters: dict[str, Any] = Field({}, description="reasoning_gym: parameters of the task.")
    # kinds template and reasoning_gym
    size: PositiveInt | None = Field(None, description="template, reasoning_gym: number of prompts.")
    seed: int = Field(0, description="template, reasoning_gym: seed of the draw.")
    # kinds file and hub
    path: str | None = Field(
        None, description="file: JSON Lines, a JSON array, CSV, TSV or Parquet, local or s3://."
    )
    name: str | None = Field(None, description="hub: data set name (or a local data set directory).")
    revision: str | None = Field(None, description="hub: revision of the data set.")
    subset: str | None = Field(
        None, description="hub: which of the data set's configurations, if it has several."
    )
    split: str = Field("train", description="hub: which split to read.")
    streaming: bool = Field(
        False,
        description="hub: read rows as they arrive instead of downloading the whole data set first.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    prompt_field: str = Field(
        "prompt",
        description="file, hub: a string, a message or a list of messages. A name of any field may be a path "
        "of keys joined by dots.",
    )
    system_field: str | None = Field(None, description="file, hub: column with the system turn.")
    string_format: Literal["text", "json", "transcript"] | None = Field(
        None,
        description="file, hub: form of strings: text, messages written as JSON, or a transcript of turns "
        "'Human:' and 'Assistant:'. null: text; a string that looks like another form is refused.",
    )
    ground_truth_field: str | None = Field(
        None, description="file, hub: column with the ground truth that the reward checks against."
    )
    ground_truth_fields: tuple[str, ...] = Field(
        (),
        description="file, hub: columns that together are the ground truth, as an object with their names, "
        "such as the tests of a programming problem.",
    )
    chosen_field: str | None = Field(
        None, description="file, hub: column with the preferred completion or conversation."
    )
    rejected_field: str | None = Field(
        None, description="file, hub: column with the other completion or conversation."
    )
    chosen_reward_field: str | None = Field(
        None,
        description="file, hub: column with the chosen completion's grade. Write -rank if less is better.",
    )
    rejected_reward_field: str | None = Field(
        None, description="file, hub: column with the rejected completion's grade, in the same way."
    )
    completion_fields: tuple[str, ...] = Field(
        (),
        description="file, hub: columns with completions: each a text, a mapping, or a list of them.",
    )
    completion_text_field: str = Field(
        "text", description="file, hub: key of the text if a completion is a mapping."
    )
    completion_reward_field: str | None = Field(
        None,
        description="file, hub: grade of a completion, a number or true/false: a key of its mapping, a "
        "column, or a list as long as the list of completions. Write -rank if less is better.",
    )
    completion_reward_fields: tuple[str, ...] = Field(
        (), description="file, hub: one such grade for each of completion_fields, in order."
    )
    completion_reward_weights: dict[str, FiniteFloat] = Field(
        {}, description="file, hub: several such grades with weights; the reward is their weighted sum."
    )

    @property
    def graded(self) -> bool:
        """Whether the data set gives its own completions rewards."""
        return bool(
            self.completion_reward_field
            or self.completion_reward_fields
            or self.completion_reward_weights
            or self.chosen_reward_field
        )

    @model_validator(mode="after")
    def _needs(self) -> PromptsConfig:
        needed = {
            "template": ("templates", "size"),
            "reasoning_gym": ("task", "size"),
            "file": ("path",),
            "hub": ("name",),
        }[self.kind]
        for field in needed:
            if not getattr(self, field):
                raise ValueError(f"prompts.{field} is missing; kind {self.kind!r} needs it")
        for field in sorted(changed_fields(self) - _prompt_fields(self.kind)):
            raise ValueError(f"prompts.{field} does not belong to kind {self.kind!r}; remove it")
        if (self.chosen_field is None) != (self.rejected_field is None):
            raise ValueError("prompts.chosen_field and prompts.rejected_field come together")
        if self.completion_fields and self.chosen_field is not None:
            raise ValueError("prompts.completion_fields and prompts.chosen_field exclude each other")
        if self.ground_truth_field is not None and self.ground_truth_fields:
            raise ValueError("prompts.ground_truth_field and prompts.ground_truth_fields exclude each other")
        self._check_completions()
        self._check_rewards()
        return self

    def _check_completions(self) -> None:
        for field in (*_COMPLETION_REWARDS, "completion_text_field"):
            if field in changed_fields(self) and not self.completion_fields:
                raise ValueError(f"prompts.{field} needs prompts.completion_fields")
        if len(set(self.completion_fields)) < len(self.completion_fields):
            raise ValueError("prompts.completion_fields names a column twice")
        if self.completion_text_field == self.completion_reward_field:
            raise ValueError("prompts.completion_text_field and prompts.completion_reward_field are one key")

    def _check_rewards(self) -> None:
        if (self.chosen_reward_field is None) != (self.rejected_reward_field is None):
            raise ValueError("prompts.chosen_reward_field and prompts.rejected_reward_field come together")
        if self.chosen_reward_field is not None and self.chosen_field is None:
            raise ValueError("prompts.chosen_reward_field needs prompts.chosen_field")
        given = [field for field in _COMPLETION_REWARDS if getattr(self, field)]
        if len(given) > 1:
            raise ValueError(f"prompts.{given[0]} and prompts.{given[1]} exclude each other")
        each = self.completion_reward_fields
        if each and len(each) != len(self.completion_fields):
            raise ValueError(
                f"prompts.completion_reward_fields names {len(each)} grades for the "
                f"{len(self.completion_fields)} prompts.completion_fields; name one for each"
            )
        for field in ("chosen_reward_field", "rejected_reward_field", "completion_reward_field"):
            _check_sign(field, getattr(self, field))
        for name in each:
            _check_sign("completion_reward_fields", name)


_COMPLETION_REWARDS = ("completion_reward_field", "completion_reward_fields", "completion_reward_weights")


def _check_sign(field: str, name: str | None) -> None:
    """Refuse a grade without a sign whose name suggests that less is better."""
    if name is None or name.startswith(("-", "+")):
        return
    words = set(re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.rpartition(".")[2]))
    if {word.lower() for word in words} & _LESS_IS_OFTEN_BETTER:
        raise ValueError(
            f"prompts.{field} {name!r} does not say whether more is better; write '-{name}' if less is "
            f"better and '+{name}' if more is"
        )


def _prompt_fields(kind: str) -> set[str]:
    drawn = {"size", "seed"}
    read = {"prompt_field", "system_field", "string_format", "ground_truth_field", "ground_truth_fields"}
    read |= {"chosen_field", "rejected_field", "chosen_reward_field", "rejected_reward_field"}
    read |= {"completion_fields", "completion_text_field", *_COMPLETION_REWARDS}
    own = {
        "template": {"templates", "words"} | drawn,
        "reasoning_gym": {"task", "parameters"} | drawn,
        "file": {"path"} | read,
        "hub": {"name", "revision", "subset", "split", "streaming"} | read,
    }[kind]
    return own | {"kind", "held_out", "system", "examples", "limit", "date", "on_unusable"}
