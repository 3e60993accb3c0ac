"""Which prompts and completions of the data set can be used: known before the first sample is drawn.

Everything that tokenizer, template, lengths and graders can tell of them, held-out ones too, is found here at
once. With `prompts.on_unusable: refuse` a run that meets any ends before anything is computed; with `skip`
they are left out of every step, and the artifact says which and why. It remembers, too, why
rewards are not to be trusted on what is left (`steps.trusted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.data.chat import Chat
from qrpo_core.data.unusable import Unusable, UnusableError, count_kinds, report_unusable, unusable_lines
from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.engines.registry import longest_sequence
from qrpo_core.errors import DataError, QRPOError
from qrpo_core.ids import digest_json
from qrpo_core.records import LEFT_OUT
from qrpo_core.rewards.registry import check_references, reward_identity
from qrpo_core.steps import policies, trusted
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.prompts import PromptTables
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 2

TOO_LONG = "too long for the model"
NO_REFERENCE = "without a reference"
BAD_REFERENCE = "with a reference that the reward refuses"
REFUSED = "that the chat template refuses"

#: What this process has found, by recipe key: preflight looks, then the run does.
_FOUND: dict[str, list[Unusable]] = {}


@dataclass(frozen=True)
class LeftOut:
    """What is left out of a run.

    problems : of prompts and of single completions. splits : split of every prompt that is named there.
    """

    problems: Sequence[Unusable] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    def digest(self, split: str) -> str:
        """What names what is left out of one split; "" for nothing."""
        names = sorted(
            {
                (each.prompt_id, -1 if each.sample_index is None else each.sample_index)
                for each in self.problems
                if each.prompt_id is not None and self.splits[each.prompt_id] == split
            }
        )
        return digest_json(names) if names else ""

    def why(self, prompt: str) -> str:
        """Why a prompt is left out; "" if it is not."""
        found = (each for each in self.problems if each.prompt_id == prompt and each.sample_index is None)
        return "; ".join(each.problem for each in found)


@dataclass(frozen=True)
class UsableTables:
    """The prompts that a run uses, their OFFLINE rows if it trains on them, and what is left out."""

    prompts: pa.Table
    offline: pa.Table | None
    left_out: LeftOut = field(default_factory=LeftOut)


def recipe(workspace: Workspace, asked: Recipe, policy: Policy) -> Recipe:
    """Decided by the prompts, the policy's tokenizer and template, lengths, and what the rewards take.

    asked : the prompts' recipe.
    """
    experiment = workspace.experiment
    config = {
        "max_new_tokens": experiment.sampling.max_new_tokens,
        "engine": experiment.sampling.engine,
        "vllm_max_length": experiment.vllm.max_length,
        "sampled": _sampled_splits(experiment),
        "offline": experiment.training_data.mode == "offline",
        "reward": reward_identity(experiment.reward),
        "judges": {name: reward_identity(each) for name, each in experiment.evaluation.judges.items()},
        **policies.rendering(workspace, policy),
    }
    return Recipe("usable", VERSION, config, {"prompts": asked.key, "policy": policy.digest})


def check(
    workspace: Workspace, asked: Recipe, tables: PromptTables, progress: Progress = no_progress
) -> None:
    """Raise one UnusableError for all that is known to be unusable, or if skipping it leaves too little, and
    one ConfigError for rewards that are not to be trusted.

    What the tokenizer tells of a GGUF file is known once that is converted.
    """
    reference = policies.reference(workspace, policies.source_of(workspace))
    manifest = None if reference is None else workspace.artifacts.find(recipe(workspace, asked, reference))
    if manifest is not None:
        _check_rewards(workspace.experiment)
        trusted.refuse(workspace.experiment, manifest.facts["doubts"])
        return
    problems = known_problems(workspace, asked, tables, reference, progress)
    _judge(workspace.experiment, tables, problems)
    trusted.refuse(workspace.experiment, _doubts(workspace.experiment, asked, tables, problems))


def build(
    workspace: Workspace,
    asked: Recipe,
    tables: PromptTables,
    policy: Policy,
    progress: Progress = no_progress,
) -> Manifest:
    """Commit `left_out.parquet`, LEFT_OUT rows, and doubts about rewards as facts; raises as `check` does."""
    made = recipe(workspace, asked, policy)

    def make(scratch: Path) -> Built:
        problems = known_problems(workspace, asked, tables, policy, progress)
        _judge(workspace.experiment, tables, problems)
        doubts = _doubts(workspace.experiment, asked, tables, problems)
        trusted.refuse(workspace.experiment, doubts)
        splits = _splits(tables.prompts)
        columns = [
            [each.prompt_id for each in problems],
            [each.sample_index for each in problems],
            [splits[each.prompt_id or ""] for each in problems],
            [each.where for each in problems],
            [each.kind for each in problems],
            [each.problem for each in problems],
        ]
        arrays = [pa.array(values, item.type) for values, item in zip(columns, LEFT_OUT, strict=True)]
        files = {"left_out.parquet": to_bytes(pa.table(arrays, schema=LEFT_OUT), LEFT_OUT, "left out")}
        return files, {
            "rows": len(tables.prompts),
            "left_out": count_kinds(problems),
            "doubts": doubts,
        }

    return workspace.make(made, make)


def usable(workspace: Workspace, asked: Recipe, tables: PromptTables, policy: Policy | None) -> UsableTables:
    """The tables without what is left out: as the store has it, else as it is found now.

    policy : None while it is not converted; then only what the rewards tell is known.
    """
    whole = UsableTables(tables.prompts, tables.offline)
    if workspace.experiment.prompts.on_unusable == "refuse":
        return whole
    manifest = None if policy is None else workspace.artifacts.find(recipe(workspace, asked, policy))
    if manifest is not None:
        return _without(whole, _stored(workspace, manifest))
    return _without(whole, known_problems(workspace, asked, tables, policy))


def known_problems(
    workspace: Workspace,
    asked: Recipe,
    tables: PromptTables,
    policy: Policy | None,
    progress: Progress = no_progress,
) -> list[Unusable]:
    """Every problem that is known by now. policy : None while it is not converted: then of rewards alone."""
    if policy is None:
        return list(_bad_references(workspace.experiment, tables.prompts))
    made = recipe(workspace, asked, policy)
    return _found(workspace, made, tables, _settings_of(workspace, policy), progress)


def _settings_of(workspace: Workspace, policy: Policy) -> Path:
    source = policies.source_of(workspace)
    return policy.directory if source.needs_materialising else source.settings


def _stored(workspace: Workspace, manifest: Manifest) -> list[Unusable]:
    rows = load(workspace, manifest, "left_out.parquet", LEFT_OUT).to_pylist()
    return [
        Unusable(row["prompt_id"], row["where"], row["problem"], "", row["kind"], row["sample_index"])
        for row in rows
    ]


def _splits(prompts: pa.Table) -> dict[str, str]:
    return dict(zip(prompts["prompt_id"].to_pylist(), prompts["split"].to_pylist(), strict=True))


def _without(tables: UsableTables, problems: Sequence[Unusable]) -> UsableTables:
    """The tables without prompts that have a problem, and without completions that have one.

    With a completion goes the other side of every pair that it is in: half a pair is none.
    """
    if not problems:
        return tables
    splits = _splits(tables.prompts)
    gone = report_unusable(problems, "skip")
    prompts, offline = tables.prompts, tables.offline
    prompts = prompts.filter(
        pc.invert(pc.is_in(prompts["prompt_id"], value_set=pa.array(sorted(gone), pa.string())))
    )
    single = {(each.prompt_id, each.sample_index) for each in problems if each.sample_index is not None}
    if offline is not None and single:
        names = [offline[name].to_pylist() for name in ("prompt_id", "sample_index", "pair")]
        rows = list(zip(*names, strict=True))
        pairs = {
            (prompt, pair) for prompt, index, pair in rows if pair is not None and (prompt, index) in single
        }
        kept = [(prompt, index) not in single and (prompt, pair) not in pairs for prompt, index, pair in rows]
        offline = offline.filter(pa.array(kept, pa.bool_()))
    named = {each.prompt_id: splits[each.prompt_id] for each in problems if each.prompt_id is not None}
    return replace(tables, prompts=prompts, offline=offline, left_out=LeftOut(tuple(problems), named))


def _judge(experiment: Experiment, tables: PromptTables, problems: Sequence[Unusable]) -> None:
    report_unusable(problems, experiment.prompts.on_unusable)
    left = _without(UsableTables(tables.prompts, tables.offline), problems)
    for split in ("train", "held_out"):
        if not pc.any(pc.equal(left.prompts["split"], split)).as_py():
            lines = unusable_lines(problems)
            lines[0] = f"no {split} prompt can be used: {lines[0]}"
            raise UnusableError.of(lines, problems)


def _doubts(
    experiment: Experiment, asked: Recipe, tables: PromptTables, problems: Sequence[Unusable]
) -> list[dict[str, Any]]:
    """What there is to doubt of the rewards, on references that they can read."""
    unread = (each.prompt_id for each in problems if each.kind in (NO_REFERENCE, BAD_REFERENCE))
    return trusted.doubts(experiment, tables.prompts, unread, asked.key)


def _found(
    workspace: Workspace, made: Recipe, tables: PromptTables, folder: Path, progress: Progress
) -> list[Unusable]:
    """Every problem, in the order of the source."""
    if made.key not in _FOUND:
        experiment = workspace.experiment
        problems = [
            *_bad_references(experiment, tables.prompts),
            *_bad_conversations(experiment, tables, workspace.chat(folder), progress),
        ]
        place = {prompt: row for row, prompt in enumerate(tables.prompts["prompt_id"].to_pylist())}
        _FOUND[made.key] = sorted(problems, key=lambda each: place[each.prompt_id or ""])
    return _FOUND[made.key]


def _bad_references(experiment: Experiment, prompts: pa.Table) -> Iterator[Unusable]:
    """What the reward refuses of all prompts, and each judge of the held-out ones."""
    _check_rewards(experiment)
    yield from _refused_by("", experiment.reward, experiment, prompts)
    held_out = prompts.filter(pc.equal(prompts["split"], "held_out"))
    for name, judge in experiment.evaluation.judges.items():
        yield from _refused_by(f"evaluation.judges.{name}: ", judge, experiment, held_out)


def _check_rewards(experiment: Experiment) -> None:
    """Raise what hinders a reward whatever the rows: no library, no model, no sandbox, no function."""
    for reward in (experiment.reward, *experiment.evaluation.judges.values()):
        check_references(reward, [])


def _refused_by(
    who: str, reward: RewardConfig, experiment: Experiment, prompts: pa.Table
) -> Iterator[Unusable]:
    columns = (prompts[name].to_pylist() for name in ("prompt_id", "source", "reference"))
    rows = list(zip(*columns, strict=True))
    problems = check_references(reward, [(prompt, reference) for prompt, _, reference in rows])
    if problems and all(reference is None for *_, reference in rows):
        raise DataError(f"{who}{problems[0].problem}", where=rows[0][1], remedy=problems[0].remedy)
    for found in problems:
        prompt, source, reference = rows[found.row]
        if reference is None and (name := experiment.prompts.reference_field) is not None:
            yield Unusable(
                prompt, source, f"{who}{name!r} is null", "fill it in or remove the row", NO_REFERENCE
            )
        else:
            kind = NO_REFERENCE if reference is None else BAD_REFERENCE
            yield Unusable(prompt, source, f"{who}{found.problem}", found.remedy, kind)


def _sampled_splits(experiment: Experiment) -> list[str]:
    """The splits whose prompts completions are drawn of."""
    data = experiment.training_data
    own = data.mode == "offline" and (data.references == "offline" or experiment.objective.kind != "qrpo")
    return ["held_out"] if own else ["held_out", "train"]


def _bad_conversations(
    experiment: Experiment, tables: PromptTables, chat: Chat, progress: Progress
) -> Iterator[Unusable]:
    """What the template refuses, and what does not fit: prompts with room for an answer, completions.

    Raises ModelError for a template that is of no use for any of them.
    """
    chat.check()
    offline = _offline_of(tables)
    sampled, new = _sampled_splits(experiment), experiment.sampling.max_new_tokens
    longest = longest_sequence(experiment, chat.max_length)
    columns = (tables.prompts[name].to_pylist() for name in ("prompt_id", "source", "messages", "split"))
    for prompt, source, messages, split in zip(*columns, strict=True):
        progress(1)
        try:
            length = len(chat.prompt_token_ids(messages))
        except QRPOError as error:
            yield _refusal(prompt, source, error)
            continue
        if split in sampled and length + new > longest:
            what = f"a prompt of {length:,} tokens and sampling.max_new_tokens {new:,} exceed {longest:,}"
            yield Unusable(prompt, source, what, "shorten it, or lower sampling.max_new_tokens", TOO_LONG)
            continue
        for index, text, place in offline.get(prompt, ()) if split == "train" else ():
            try:
                answer = len(chat.encode_completion(text, messages))
            except QRPOError as error:
                yield _refusal(prompt, place, error, index)
                continue
            if length + answer > chat.max_length:
                what = f"prompt and completion of {length + answer:,} tokens exceed {chat.max_length:,}"
                yield Unusable(prompt, place, what, "shorten or remove it", TOO_LONG, index)


def _refusal(prompt: str, where: str, error: QRPOError, index: int | None = None) -> Unusable:
    return Unusable(prompt, where, error.message, error.remedy or "change it", REFUSED, index)


def _offline_of(tables: PromptTables) -> dict[str, list[tuple[int, str, str]]]:
    """(sample_index, text, place) of every different completion, by prompt."""
    found: dict[str, dict[int, tuple[int, str, str]]] = {}
    if tables.offline is not None:
        names = ("prompt_id", "sample_index", "text", "source", "label")
        columns = (tables.offline[name].to_pylist() for name in names)
        for prompt, index, text, source, label in zip(*columns, strict=True):
            place = f"{source}, {label}" if label else source
            found.setdefault(prompt, {}).setdefault(index, (index, text, place))
    return {prompt: list(rows.values()) for prompt, rows in found.items()}
