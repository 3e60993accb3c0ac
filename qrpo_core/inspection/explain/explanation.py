"""Everything that the store has about one prompt or one completion, in JSON types. Writes nothing.

The pipeline's own code (`pipeline.training_targets.derive`, `objective.quantiles`) computes all numbers, so
an explanation cannot disagree with the training. Notes list the rows that the store does not have yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from qrpo_core.common.errors import MissingError
from qrpo_core.common.schemas import LOGPROBS
from qrpo_core.inspection.completion_groups import CompletionGroup, held_out_groups, training_groups
from qrpo_core.inspection.explain.query import find_prompt, parse_query, refuse_left_out
from qrpo_core.inspection.explain.ranks import PromptInRound, prompt_in_round
from qrpo_core.inspection.explain.stored_rows import (
    blocks_of,
    drawn_rows,
    every_reward,
    graded_part,
    ranges,
    read_present,
    reward_rows,
)
from qrpo_core.maintenance.in_use import known_prompts, steps_of
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.completions import Completions, OfflineCompletions, Rewards, Unscored
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_steps import LogprobStep, RewardStep, SampleStep
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import row_key
from qrpo_core.store.recipe import Recipe

Row = dict[str, Any]

#: The note of completions that the training uses without rewards.
_LABELS = "not scored: the data set's labels decide"


@dataclass(frozen=True)
class PromptGroup:
    """The completions of one prompt in a group. prompt : the PROMPTS row."""

    group: CompletionGroup
    prompt: Row

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def completions(self) -> Completions:
        return self.group.completions

    @property
    def rewards(self) -> Rewards:
        return self.group.rewards

    @property
    def round_(self) -> Round | None:
        return self.group.round_

    @property
    def logprobs(self) -> tuple[LogprobStep, ...]:
        return self.group.logprobs

    @property
    def wanted(self) -> Sequence[int]:
        """The sample indices that the experiment asks for."""
        completions = self.completions
        if isinstance(completions, OfflineCompletions) and not len(completions.rows):
            return ()  # `wanted` refuses a data set without completions
        return completions.wanted.get(self.prompt["prompt_id"], ())

    @property
    def policy(self) -> str | None:
        """The digest of the policy that drew the completions; None for those of the data set."""
        return self.completions.policy.digest if isinstance(self.completions, SampleStep) else None

    def in_round(self) -> PromptInRound | None:
        """The ranks and targets of this prompt in their round; None if no round trains on them."""
        return None if self.round_ is None else prompt_in_round(self.round_, self.prompt["prompt_id"])


def explain(workspace: Workspace, query: str) -> Row:
    """Everything about a prompt or a completion.

    query : `PROMPT` or `PROMPT:INDEX`, a prompt_id or a unique beginning of one, and a sample_index.

    Raises MissingError for an unknown prompt or completion, QRPOError for an invalid query.
    """
    name, index = parse_query(query)
    asked, tables = known_prompts(workspace)
    refuse_left_out(tables.left_out, name)
    prompt = find_prompt(tables.prompts, name)
    only = tables.prompts.filter(pc.equal(tables.prompts["prompt_id"], prompt))
    # Only a digest of retryable rewards makes a recipe depend on the other prompts. Without such rewards the
    # steps of this prompt alone have the same recipes.
    some = tables if _unsettled(workspace) else replace(tables, prompts=only)
    steps = steps_of(workspace, asked, some)
    row = only.to_pylist()[0]
    groups = list(_draws(steps, row))
    found: Row = {"experiment": workspace.experiment.name, "store": workspace.objects.url, "prompt": row}
    if index is None:
        return found | {"budget": _budget(steps, prompt), "draws": [_overview(each) for each in groups]}
    sections = [_completion(steps, each, index) for each in groups if index in each.wanted]
    if not sections:
        known = "; ".join(f"{each.name} {ranges(each.wanted)}" for each in groups)
        raise MissingError(f"prompt {prompt} has no completion {index}", remedy=f"there are {known}")
    return found | {"sample_index": index, "draws": sections}


def _unsettled(workspace: Workspace) -> bool:
    """Whether the store has rewards with a retryable status."""
    blocks = workspace.blocks
    return any(blocks.retryable(Recipe.from_dict(raw)) for raw in blocks.recipes("reward"))


def _draws(steps: ExperimentSteps, prompt: Row) -> Iterator[PromptGroup]:
    """All groups of completions of a prompt that the experiment has so far."""
    held_out = prompt["split"] == "held_out"
    for group in held_out_groups(steps) if held_out else training_groups(steps):
        yield PromptGroup(group, prompt)


def _budget(steps: ExperimentSteps, prompt: str) -> Row | None:
    """The numbers of wanted and drawn references of a prompt; None if the experiment draws none."""
    step = next((each for each in steps.first.row_steps if isinstance(each, SampleStep)), None)
    if step is None or prompt not in step.wanted:
        return None
    asked = step.wanted[prompt]
    blocks = step.workspace.blocks.committed(step.recipe)
    drawn = set().union(*(block.ranges.indices(prompt) for block in blocks))
    return {
        "references": len(asked),
        "of_every_prompt": step.count,
        "of_this_prompt": step.budget.get(prompt),
        "drawn": len(drawn.intersection(asked)),
        "drawn_beyond": len(drawn.difference(asked)),
    }


def _overview(draws: PromptGroup) -> Row:
    """The overview of a group: a row for each drawn completion, and notes."""
    wanted, in_round = draws.wanted, draws.in_round()
    tokens = {} if in_round is None else in_round.token_ids
    drawn = drawn_rows(draws.completions, draws.prompt, wanted, tokens)
    rewards = reward_rows(draws.rewards, draws.prompt, wanted)
    rows = [
        {"sample_index": index}
        | {name: drawn[index][name] for name in ("num_tokens", "finish_reason")}
        | {name: rewards.get(index, {}).get(name) for name in ("reward", "status")}
        | ({} if in_round is None else in_round.brief(index))
        | {"text": drawn[index]["text"]}
        for index in wanted
        if index in drawn
    ]
    undrawn, unscored = len(wanted) - len(rows), sum(index not in rewards for index in drawn)
    notes = [f"{undrawn} of {len(wanted)} not drawn yet"] if undrawn else []
    labels = isinstance(draws.rewards, Unscored)
    notes += [_LABELS] if labels else [f"{unscored} of {len(wanted)} not scored yet"] if unscored else []
    section = {"name": draws.name, "policy": draws.policy, "completions": rows}
    if in_round is not None:
        section |= in_round.of_prompt()
        notes += in_round.notes
    return section | {"notes": notes}


def _completion(steps: ExperimentSteps, draws: PromptGroup, index: int) -> Row:
    """A completion of a group: text, rewards, ranks, targets, and the blocks and artifacts with them."""
    workspace, in_round = steps.workspace, draws.in_round()
    prompt = draws.prompt["prompt_id"]
    tokens = {} if in_round is None else in_round.token_ids
    drawn = drawn_rows(draws.completions, draws.prompt, (index,), tokens).get(index)
    reward = reward_rows(draws.rewards, draws.prompt, (index,)).get(index)
    logprobs = []
    for step in draws.logprobs:
        found = read_present(workspace.blocks, step.recipe, prompt, (index,), LOGPROBS).get(index)
        logprobs.append({"step": step.label, "logprob": None if found is None else found["logprob"]})
    section: Row = {"name": draws.name, "policy": draws.policy, "completion": drawn, "reward": reward}
    section["graded"] = graded_part(draws.rewards, drawn, reward)
    section |= {"every_reward": every_reward(draws.completions, draws.rewards, prompt, index)}
    section |= {"logprobs": logprobs}
    if isinstance(draws.completions, OfflineCompletions):
        rows = draws.completions.rows
        section["data_set"] = rows.filter(pc.equal(rows["sample_index"], index)).to_pylist()
    notes = ["not drawn yet"] if drawn is None else []
    notes += [_LABELS if isinstance(draws.rewards, Unscored) else "not scored yet"] if reward is None else []
    if in_round is not None:
        section |= in_round.of_prompt() | in_round.of_completion(index)
        cut = drawn is not None and drawn["finish_reason"] == "length"
        notes += in_round.notes + in_round.reasons(index, None if reward is None else reward["status"], cut)
    section |= {"notes": notes, "blocks": list(_blocks(workspace, draws, index))}
    return section | {"artifacts": [_artifact(workspace, each) for each in _artifacts(steps, draws)]}


def _blocks(workspace: Workspace, draws: PromptGroup, index: int) -> Iterator[Row]:
    """The blocks that hold the completion, its reward and its log-probs."""
    prompt = draws.prompt["prompt_id"]
    scored = row_key(prompt, draws.prompt["ground_truth_digest"])
    steps: list[tuple[str, Recipe, str]] = []
    if isinstance(draws.completions, SampleStep):
        steps.append(("completion", draws.completions.recipe, prompt))
    if isinstance(draws.rewards, RewardStep):
        steps.append(("reward", draws.rewards.recipe, scored))
    steps += [(step.label, step.recipe, prompt) for step in draws.logprobs]
    for what, recipe, key in steps:
        yield from blocks_of(workspace.blocks, recipe, key, index, what)


def _artifacts(steps: ExperimentSteps, draws: PromptGroup) -> Iterator[Recipe]:
    """The recipes of the artifacts that the numbers come from, and of the training that uses them."""
    source = policies.source_of(steps.workspace)
    if source.needs_conversion:
        yield policies.recipe(steps.workspace, source)
    yield steps.prompts_recipe
    if draws.round_ is not None:
        if draws.round_.number > 1:
            yield steps.round(draws.round_.number - 1).train_recipe
        yield from (
            draws.round_.quantiles_recipe,
            draws.round_.training_set_recipe,
            draws.round_.train_recipe,
        )
    elif draws.logprobs:
        yield steps.last().train_recipe


def _artifact(workspace: Workspace, recipe: Recipe) -> Row:
    """An artifact's step, recipe, time and code version; the last two are None if it is missing."""
    made = workspace.artifacts.find(recipe)
    facts = {"created": None, "code": None} if made is None else {"created": made.created, "code": made.code}
    return {"step": recipe.step, "recipe": recipe.key, **facts}
