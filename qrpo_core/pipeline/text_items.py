"""Items of `QRPOTrainer` from rows of text, read and tokenised as the pipeline does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from qrpo_core.common.errors import DataError
from qrpo_core.common.hashing import prompt_id
from qrpo_core.common.schemas import PAIRS, REFERENCE_REWARDS, TRAINING_SET
from qrpo_core.config import ModelConfig, ObjectiveConfig, PromptsConfig
from qrpo_core.data.rows import parse_row
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.models.chat import Chat
from qrpo_core.models.source import resolve_model
from qrpo_core.objective.quantiles import rank_counts_table
from qrpo_core.objective_kinds import KINDS, make_objective
from qrpo_core.pipeline.training_targets import training_data

if TYPE_CHECKING:
    from qrpo_core.data.collator import ExampleColumns, PairColumns

_OWN = PromptsConfig(kind="file", path="rows", completion_fields=("completion",))
_PAIR = PromptsConfig(kind="file", path="rows", chosen_field="chosen", rejected_field="rejected")


def text_items(
    rows: Iterable[Mapping[str, Any]],
    model: Path | str,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
    in_pool: bool = False,
    precision: str = "fp32",
    temperature: float = 1.0,
) -> ExampleColumns | PairColumns:
    """The training items of an objective.

    Parameters
    ----------
    rows : a Hugging Face data set, or mappings. `prompt` is a string (a user turn) or a list of messages;
        `completion` is an answer, or `chosen` and `rejected` are two: a string, or messages that end with it.
        `reward` (of a pair `reward_chosen`, `reward_rejected`) and `reference_rewards`, the rewards of
        completions that the model draws for the prompt, are needed where targets come from quantiles.
        `ref_logprob` (of a pair `ref_logprob_chosen`, `ref_logprob_rejected`) in nats; computed where it is
        missing and the objective needs it.
    model : the reference model, a directory or hub id. Its chat template writes prompts and completions.
    in_pool : whether each completion is one of its prompt's references; it is then left out of its ranking.
    precision : of the reference log-probs, as of the training: fp32, bf16, or bf16-weights.
    temperature : of the log-probs, as of the trainer.

    Raises DataError for a row that cannot be read or lacks a column, and errors as `training_data`.
    """
    directory = resolve_model(ModelConfig(path=str(model))).directory
    read = _Rows(Chat.load(directory), objective.has_targets)
    for place, row in enumerate(rows):
        read.add(row, f"row {place}")
    if not read.texts:
        raise DataError("no rows", remedy="give at least one")
    known = [each.ref_logprob for each in read.texts]
    if None in known and make_objective(objective).needs_reference:
        from qrpo_core.engines.transformers import TransformersEngine

        requests = [LogprobRequest(each.prompt_token_ids, each.token_ids) for each in read.texts]
        engine = TransformersEngine(directory, precision=precision)
        known = engine.logprobs(requests, temperature=temperature).tolist()
        engine.close()
    if KINDS[objective.kind].items == "chosen" and not read.pairs:  # all that sft asks for
        return _plain(read.texts)
    table, references = read.tables([0.0 if each is None else each for each in known], in_pool)
    columns = [[pair[side] for pair in read.pairs] for side in range(3)]
    return training_data(table, pa.table(columns, schema=PAIRS), references, objective).items()


@dataclass(frozen=True)
class _Text:
    """One completion. prompt, index : its name."""

    prompt: str
    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    reward: float | None
    ref_logprob: float | None


class _Rows:
    """The completions and pairs of the rows, and the reference rewards of each prompt."""

    def __init__(self, chat: Chat, ranked: bool) -> None:
        self.chat, self.ranked = chat, ranked
        self.texts: list[_Text] = []
        self.pairs: list[tuple[str, int, int]] = []
        self.references: dict[str, tuple[float, ...]] = {}
        self.indices: Counter[str] = Counter()

    def add(self, row: Mapping[str, Any], where: str) -> None:
        paired = row.get("chosen") is not None
        found = parse_row(row, where, _PAIR if paired else _OWN, Counter())
        completions = found.pair or found.completions
        if not completions:
            raise DataError(
                "a row without a completion", where=where, remedy="give completion, or chosen and rejected"
            )
        prompt = prompt_id(found.messages)
        tokens = self.chat.prompt_token_ids(found.messages)
        if self.ranked:
            self._add_references(prompt, row, where)
        for completion, suffix in zip(
            completions, ("_chosen", "_rejected") if paired else ("",), strict=True
        ):
            reward, logprob = row.get(f"reward{suffix}"), row.get(f"ref_logprob{suffix}")
            if self.ranked and reward is None:
                raise DataError(f"no reward{suffix}", where=where, remedy="the objective ranks by rewards")
            answer = self.chat.encode_completion(completion.text, found.messages)
            self.texts.append(_Text(prompt, self.indices[prompt], tokens, answer, reward, logprob))
            self.indices[prompt] += 1
        if paired:
            self.pairs.append((prompt, self.indices[prompt] - 2, self.indices[prompt] - 1))

    def _add_references(self, prompt: str, row: Mapping[str, Any], where: str) -> None:
        given = row.get("reference_rewards")
        if not given:
            raise DataError(
                "no reference_rewards",
                where=where,
                remedy="give the rewards of completions that the model draws for this prompt",
            )
        rewards = tuple(sorted(map(float, given)))
        if self.references.setdefault(prompt, rewards) != rewards:
            raise DataError(
                "an earlier row of this prompt has other reference_rewards",
                where=where,
                remedy="give all in both",
            )

    def tables(self, logprobs: Sequence[float], in_pool: bool) -> tuple[pa.Table, pa.Table]:
        """TRAINING_SET and REFERENCE_REWARDS rows."""
        below = equal = n = np.zeros(len(self.texts), np.int64)
        if self.ranked:
            code = {prompt: number for number, prompt in enumerate(self.references)}
            owners = np.repeat(np.arange(len(code)), [len(each) for each in self.references.values()])
            pool = np.concatenate([np.array(each) for each in self.references.values()])
            samples = np.array([code[each.prompt] for each in self.texts])
            rewards = np.array([each.reward for each in self.texts], np.float64)
            counts = rank_counts_table(samples, rewards, owners, pool, in_pool)
            below, equal, n = counts.below, counts.equal, counts.n
        columns = {
            "prompt_id": [each.prompt for each in self.texts],
            "sample_index": [each.index for each in self.texts],
            "prompt_token_ids": [each.prompt_token_ids for each in self.texts],
            "token_ids": [each.token_ids for each in self.texts],
            "reward": [each.reward for each in self.texts],
            "below": below,
            "equal": equal,
            "n": n,
            "in_pool": [in_pool] * len(self.texts),
            "ref_logprob": logprobs,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in TRAINING_SET]
        references = [list(self.references), [list(each) for each in self.references.values()]]
        return pa.table(arrays, schema=TRAINING_SET), pa.table(references, schema=REFERENCE_REWARDS)


def _plain(texts: Sequence[_Text]) -> ExampleColumns:
    """Completions without targets."""
    from qrpo_core.data.collator import ExampleColumns

    nothing, one = np.zeros(len(texts)), np.ones(len(texts))
    prompts, answers = (
        pa.chunked_array([pa.array([getattr(each, name) for each in texts], pa.list_(pa.int32()))])
        for name in ("prompt_token_ids", "token_ids")
    )
    return ExampleColumns(prompts, answers, nothing, one, nothing, nothing, nothing)
