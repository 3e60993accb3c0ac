"""The usable prompts and completions of the data set, checked before the first sample is drawn.

Tokenizer, chat template, length limits and graders check every row, held-out rows too. With
`prompts.on_unusable: refuse` a run with unusable rows ends before it computes anything; with `skip` every
step leaves those rows out, and the artifact lists them with the reasons. The artifact also holds the reasons
not to trust the rewards (`pipeline.reward_trust`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.hashing import digest_json
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.common.schemas import LEFT_OUT
from qrpo_core.config import Experiment
from qrpo_core.data.unusable import Unusable, UnusableError, count_kinds, report_unusable, unusable_lines
from qrpo_core.pipeline import policies, reward_trust
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.pipeline.row_checks import (
    BAD_GROUND_TRUTH,
    NO_GROUND_TRUTH,
    bad_conversations,
    bad_ground_truths,
    check_rewards,
    sampled_splits,
)
from qrpo_core.pipeline.workspace import Built, Workspace, as_parquet
from qrpo_core.rewards.registry import reward_identity
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

VERSION = 2

#: The problems found by this process, by recipe key: preflight and the run both need them.
_FOUND: dict[str, list[Unusable]] = {}


@dataclass(frozen=True)
class LeftOut:
    """The rows that a run leaves out.

    problems : of prompts and of single completions. splits : the split of each of these prompts.
    """

    problems: Sequence[Unusable] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    def digest(self, split: str) -> str:
        """A digest of the rows left out of one split; "" for none."""
        names = sorted(
            {
                (each.prompt_id, -1 if each.sample_index is None else each.sample_index)
                for each in self.problems
                if each.prompt_id is not None and self.splits[each.prompt_id] == split
            }
        )
        return digest_json(names) if names else ""

    def why(self, prompt: str) -> str:
        """The reason why a prompt is left out; "" if it is used."""
        found = (each for each in self.problems if each.prompt_id == prompt and each.sample_index is None)
        return "; ".join(each.problem for each in found)


@dataclass(frozen=True)
class UsableTables:
    """The usable prompts, their OFFLINE rows if the run trains on them, and the rows left out."""

    prompts: pa.Table
    offline: pa.Table | None
    left_out: LeftOut = field(default_factory=LeftOut)


def recipe(workspace: Workspace, prompts_recipe: Recipe, policy: Policy) -> Recipe:
    """Decided by the prompts, the policy's tokenizer and template, the length limits, and the rewards."""
    experiment = workspace.experiment
    config = {
        "max_new_tokens": experiment.sampling.max_new_tokens,
        "engine": experiment.sampling.engine,
        "vllm_max_length": experiment.vllm.max_length,
        "sampled": sampled_splits(experiment),
        "offline": experiment.training_data.uses_data_set,
        "reward": reward_identity(experiment.reward),
        "judges": {name: reward_identity(each) for name, each in experiment.evaluation.judges.items()},
        **policies.rendering(workspace, policy),
    }
    return Recipe("usable", VERSION, config, {"prompts": prompts_recipe.key, "policy": policy.digest})


def check(
    workspace: Workspace, prompts_recipe: Recipe, tables: PromptTables, progress: Progress = no_progress
) -> None:
    """Raise UnusableError for unusable rows, or if skipping them leaves a split empty.

    Raises ConfigError for rewards that cannot be trusted. Without a converted policy (GGUF), only the rewards
    are checked.
    """
    reference = policies.reference(workspace, policies.source_of(workspace))
    manifest = (
        None if reference is None else workspace.artifacts.find(recipe(workspace, prompts_recipe, reference))
    )
    if manifest is not None:
        check_rewards(workspace.experiment)
        reward_trust.refuse(workspace.experiment, manifest.facts["doubts"])
        return
    problems = known_problems(workspace, prompts_recipe, tables, reference, progress)
    _judge(workspace.experiment, tables, problems)
    reward_trust.refuse(
        workspace.experiment, _reward_problems(workspace.experiment, prompts_recipe, tables, problems)
    )


def build(
    workspace: Workspace,
    prompts_recipe: Recipe,
    tables: PromptTables,
    policy: Policy,
    progress: Progress = no_progress,
) -> Manifest:
    """Commit `left_out.parquet` (LEFT_OUT rows) with reward problems as facts; raises as `check` does."""
    made = recipe(workspace, prompts_recipe, policy)

    def make(scratch: Path) -> Built:
        problems = known_problems(workspace, prompts_recipe, tables, policy, progress)
        _judge(workspace.experiment, tables, problems)
        reward_problems = _reward_problems(workspace.experiment, prompts_recipe, tables, problems)
        reward_trust.refuse(workspace.experiment, reward_problems)
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
        files = {"left_out.parquet": as_parquet(pa.table(arrays, schema=LEFT_OUT), LEFT_OUT, "left out")}
        return files, {
            "rows": len(tables.prompts),
            "left_out": count_kinds(problems),
            "doubts": reward_problems,
        }

    return workspace.make(made, make)


def usable(
    workspace: Workspace, prompts_recipe: Recipe, tables: PromptTables, policy: Policy | None
) -> UsableTables:
    """The tables without unusable rows, as the store lists them or as a new check finds them.

    policy : None until it is converted; then only the rewards are checked.
    """
    whole = UsableTables(tables.prompts, tables.offline)
    if workspace.experiment.prompts.on_unusable == "refuse":
        return whole
    manifest = None if policy is None else workspace.artifacts.find(recipe(workspace, prompts_recipe, policy))
    if manifest is not None:
        return _without(whole, _stored(workspace, manifest))
    return _without(whole, known_problems(workspace, prompts_recipe, tables, policy))


def known_problems(
    workspace: Workspace,
    prompts_recipe: Recipe,
    tables: PromptTables,
    policy: Policy | None,
    progress: Progress = no_progress,
) -> list[Unusable]:
    """Every known problem. Without a tokenizer only the rewards are checked.

    policy : None until it is converted.
    """
    if policy is None or policies.source_of(workspace).lacks == "tokenizer":
        return list(bad_ground_truths(workspace.experiment, tables.prompts))
    made = recipe(workspace, prompts_recipe, policy)
    return _found(workspace, made, tables, _settings_of(workspace, policy), progress)


def _settings_of(workspace: Workspace, policy: Policy) -> Path:
    source = policies.source_of(workspace)
    return policy.directory if source.needs_conversion else source.settings


def _stored(workspace: Workspace, manifest: Manifest) -> list[Unusable]:
    rows = workspace.load(manifest, "left_out.parquet", LEFT_OUT).to_pylist()
    return [
        Unusable(row["prompt_id"], row["where"], row["problem"], "", row["kind"], row["sample_index"])
        for row in rows
    ]


def _splits(prompts: pa.Table) -> dict[str, str]:
    return dict(zip(prompts["prompt_id"].to_pylist(), prompts["split"].to_pylist(), strict=True))


def _without(tables: UsableTables, problems: Sequence[Unusable]) -> UsableTables:
    """The tables without prompts that have a problem, and without completions that have one.

    A completion with a problem takes its pairs with it.
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
    for split in sorted(set(_splits(tables.prompts).values()), reverse=True):
        if not pc.any(pc.equal(left.prompts["split"], split)).as_py():
            lines = unusable_lines(problems)
            lines[0] = f"no {split} prompt can be used: {lines[0]}"
            raise UnusableError.of(lines, problems)


def _reward_problems(
    experiment: Experiment, prompts_recipe: Recipe, tables: PromptTables, problems: Sequence[Unusable]
) -> list[dict[str, Any]]:
    """The problems of the rewards, tried on readable ground truths."""
    unread = (each.prompt_id for each in problems if each.kind in (NO_GROUND_TRUTH, BAD_GROUND_TRUTH))
    return reward_trust.reward_problems(experiment, tables.prompts, unread, prompts_recipe.key)


def _found(
    workspace: Workspace, made: Recipe, tables: PromptTables, folder: Path, progress: Progress
) -> list[Unusable]:
    """Every problem, in the order of the source."""
    if made.key not in _FOUND:
        experiment = workspace.experiment
        problems = [
            *bad_ground_truths(experiment, tables.prompts),
            *bad_conversations(experiment, tables, workspace.chat(folder), progress),
        ]
        place = {prompt: row for row, prompt in enumerate(tables.prompts["prompt_id"].to_pylist())}
        _FOUND[made.key] = sorted(problems, key=lambda each: place[each.prompt_id or ""])
    return _FOUND[made.key]
