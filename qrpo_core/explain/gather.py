"""All that the store has of one prompt, or of one completion of it, JSON-ready. Writes nothing.

Everything is looked up or derived by the code that the pipeline itself runs (`steps.targets.derive`,
`objective.quantiles`), so that an explanation cannot disagree with the training. What is not in the store yet
is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from qrpo_core.errors import MissingError
from qrpo_core.explain.query import find_prompt, parse_query, refuse_left_out
from qrpo_core.explain.rows import (
    blocks_of,
    drawn_rows,
    every_reward,
    graded_part,
    ranges,
    read_present,
    reward_rows,
)
from qrpo_core.explain.standing import Standing, standing
from qrpo_core.inventory.uses import chain_of, known_prompts
from qrpo_core.records import LOGPROBS
from qrpo_core.steps import policies
from qrpo_core.steps.blocks import LogprobStep, RewardStep, SampleStep
from qrpo_core.steps.chain import Chain
from qrpo_core.steps.completions import Completions, OfflineCompletions, Unscored
from qrpo_core.steps.quantiles import Rewards
from qrpo_core.steps.rounds import Round
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.blocks import row_key
from qrpo_core.store.recipe import Recipe

Row = dict[str, Any]

#: What stands in the place of rewards where none is needed.
_LABELS = "not scored: the data set's labels decide"


@dataclass(frozen=True)
class Draws:
    """Completions of one prompt that belong together, and their rewards.

    prompt : the PROMPTS row. logprobs : what scores their tokens. round_ : what trains on them, if anything.
    """

    name: str
    prompt: Row
    completions: Completions
    rewards: Rewards
    logprobs: tuple[LogprobStep, ...] = ()
    round_: Round | None = None

    @property
    def wanted(self) -> Sequence[int]:
        """The sample indices that the experiment asks for."""
        completions = self.completions
        if isinstance(completions, OfflineCompletions) and not len(completions.rows):
            return ()  # its `wanted` takes a data set without completions for a mistake
        return completions.wanted.get(self.prompt["prompt_id"], ())

    @property
    def policy(self) -> str | None:
        """The digest of the policy that drew them; None for the data set's own."""
        return self.completions.policy.digest if isinstance(self.completions, SampleStep) else None

    def standing(self) -> Standing | None:
        """How they stand in their round."""
        return None if self.round_ is None else standing(self.round_, self.prompt["prompt_id"])


def explain(workspace: Workspace, query: str) -> Row:
    """Everything about `PROMPT` or `PROMPT:INDEX`.

    PROMPT is a prompt_id or a unique beginning of one; INDEX a sample_index. Raises MissingError for a prompt
    or a completion that the experiment does not have, QRPOError for a query that is none.
    """
    name, index = parse_query(query)
    asked, tables = known_prompts(workspace)
    refuse_left_out(tables.left_out, name)
    prompt = find_prompt(tables.prompts, name)
    only = tables.prompts.filter(pc.equal(tables.prompts["prompt_id"], prompt))
    # Where no status can pass, no recipe depends on which other prompts there are, so the chain of one prompt
    # names the same results.
    some = tables if _unsettled(workspace) else replace(tables, prompts=only)
    chain = chain_of(workspace, asked, some)
    row = only.to_pylist()[0]
    groups = list(_draws(chain, row))
    found: Row = {"experiment": workspace.experiment.name, "store": workspace.objects.url, "prompt": row}
    if index is None:
        return found | {"budget": _budget(chain, prompt), "draws": [_overview(each) for each in groups]}
    sections = [_completion(chain, each, index) for each in groups if index in each.wanted]
    if not sections:
        known = "; ".join(f"{each.name} {ranges(each.wanted)}" for each in groups)
        raise MissingError(f"prompt {prompt} has no completion {index}", remedy=f"there are {known}")
    return found | {"sample_index": index, "draws": sections}


def _unsettled(workspace: Workspace) -> bool:
    """Whether the store has rewards whose status can pass."""
    blocks = workspace.blocks
    return any(blocks.passing(Recipe.from_dict(raw)) for raw in blocks.recipes("reward"))


def _draws(chain: Chain, prompt: Row) -> Iterator[Draws]:
    """Every group of completions that a prompt has, as far as it is known by now."""
    rounds = list(chain.planned_rounds())
    last = rounds[-1]
    if prompt["split"] == "held_out":
        before = chain.before
        yield Draws("held-out, before", prompt, before.samples, before.rewards)
        trained = chain.workspace.artifacts.find(last.train) is not None
        if trained and last.number == chain.workspace.experiment.rounds.count:
            end = chain.after(last)
            divergence = (end.divergence.policy, end.divergence.reference)
            yield Draws("held-out, after", prompt, end.after.samples, end.after.rewards, divergence)
        return
    references = chain.first.references
    if references is not None and references is not chain.first.rewards:
        yield Draws("references", prompt, references.completions, references)
    for round_ in rounds:
        rewards = round_.rewards
        own = isinstance(rewards.completions, OfflineCompletions)
        name = f"round {round_.number}" if round_.number > 1 else "offline" if own else "references"
        scored = LogprobStep(rewards.completions, round_.reference, round_.label("reference log-probs"))
        yield Draws(name, prompt, rewards.completions, rewards, (scored,), round_)


def _budget(chain: Chain, prompt: str) -> Row | None:
    """How many references are asked for and drawn; None where none are drawn."""
    step = next((each for each in chain.first.row_steps if isinstance(each, SampleStep)), None)
    if step is None or prompt not in step.wanted:
        return None
    asked = step.wanted[prompt]
    blocks = step.workspace.blocks.committed(step.recipe)
    runs = [run for block in blocks if prompt in block.runs.keys for run in block.runs if run.key == prompt]
    drawn = {index for run in runs for index in range(run.first, run.first + run.count)}
    return {
        "references": len(asked),
        "of_every_prompt": step.count,
        "of_this_prompt": step.budget.get(prompt),
        "drawn": len(drawn.intersection(asked)),
        "drawn_beyond": len(drawn.difference(asked)),
    }


def _overview(draws: Draws) -> Row:
    """One group, a row for each completion that is there."""
    wanted, stands = draws.wanted, draws.standing()
    tokens = {} if stands is None else stands.token_ids
    drawn = drawn_rows(draws.completions, draws.prompt, wanted, tokens)
    rewards = reward_rows(draws.rewards, draws.prompt, wanted)
    rows = [
        {"sample_index": index}
        | {name: drawn[index][name] for name in ("num_tokens", "finish_reason")}
        | {name: rewards.get(index, {}).get(name) for name in ("reward", "status")}
        | ({} if stands is None else stands.brief(index))
        | {"text": drawn[index]["text"]}
        for index in wanted
        if index in drawn
    ]
    undrawn, unscored = len(wanted) - len(rows), sum(index not in rewards for index in drawn)
    notes = [f"{undrawn} of {len(wanted)} not drawn yet"] if undrawn else []
    labels = isinstance(draws.rewards, Unscored)
    notes += [_LABELS] if labels else [f"{unscored} of {len(wanted)} not scored yet"] if unscored else []
    section = {"name": draws.name, "policy": draws.policy, "completions": rows}
    if stands is not None:
        section |= stands.of_prompt()
        notes += stands.notes
    return section | {"notes": notes}


def _completion(chain: Chain, draws: Draws, index: int) -> Row:
    """One completion in one group: what it is, what it scored, how it stands, and what holds all that."""
    workspace, stands = chain.workspace, draws.standing()
    prompt = draws.prompt["prompt_id"]
    tokens = {} if stands is None else stands.token_ids
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
    if stands is not None:
        section |= stands.of_prompt() | stands.of_completion(index)
        cut = drawn is not None and drawn["finish_reason"] == "length"
        notes += stands.notes + stands.reasons(index, None if reward is None else reward["status"], cut)
    section |= {"notes": notes, "blocks": list(_blocks(workspace, draws, index))}
    return section | {"artifacts": [_artifact(workspace, each) for each in _artifacts(chain, draws)]}


def _blocks(workspace: Workspace, draws: Draws, index: int) -> Iterator[Row]:
    """The blocks that hold the completion, its reward and its log-probs."""
    prompt = draws.prompt["prompt_id"]
    scored = row_key(prompt, draws.prompt["reference_digest"])
    steps: list[tuple[str, Recipe, str]] = []
    if isinstance(draws.completions, SampleStep):
        steps.append(("completion", draws.completions.recipe, prompt))
    if isinstance(draws.rewards, RewardStep):
        steps.append(("reward", draws.rewards.recipe, scored))
    steps += [(step.label, step.recipe, prompt) for step in draws.logprobs]
    for what, recipe, key in steps:
        yield from blocks_of(workspace.blocks, recipe, key, index, what)


def _artifacts(chain: Chain, draws: Draws) -> Iterator[Recipe]:
    """What the numbers come from, and the training that uses them."""
    source = policies.source_of(chain.workspace)
    if source.needs_materialising:
        yield policies.recipe(chain.workspace, source)
    yield chain.prompts
    if draws.round_ is not None:
        if draws.round_.number > 1:
            yield chain.round(draws.round_.number - 1).train
        yield from (draws.round_.quantiles, draws.round_.training_set, draws.round_.train)
    elif draws.logprobs:
        yield chain.last().train


def _artifact(workspace: Workspace, recipe: Recipe) -> Row:
    """Name, age and code version of an artifact; of one that is not there yet only its name."""
    made = workspace.artifacts.find(recipe)
    facts = {"created": None, "code": None} if made is None else {"created": made.created, "code": made.code}
    return {"step": recipe.step, "recipe": recipe.key, **facts}
