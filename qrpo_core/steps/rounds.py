"""One round of training: which completions, ranked among which references, from which policy.

The first round trains on what `training_data` names; each later one draws from the policy that the round
before it made, and ranks its draws among the same references. Reference log-probs are always the reference
policy's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qrpo_core.errors import ObjectiveError
from qrpo_core.steps import budgets, prompts, quantiles, signal, training, training_set
from qrpo_core.steps.blocks import BlockStep, LogprobStep, RewardStep, SampleStep, reward_recipe
from qrpo_core.steps.completions import GivenRewards, OfflineCompletions, Unscored
from qrpo_core.steps.policies import Policy
from qrpo_core.steps.selection import expected_rows
from qrpo_core.steps.usable import UsableTables
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.blocks import Wanted
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class Made:
    """The artifacts of a finished round."""

    quantiles: Manifest
    training_set: Manifest
    train: Manifest


@dataclass(frozen=True)
class Round:
    """The steps and recipes of a round.

    number : 1, 2, ... start : the policy that training starts from.
    row_steps : what is drawn and scored before anything is ranked.
    references : what `rewards` are ranked among; the same object where the completions are the references,
        None where the objective ranks nothing.
    prompts : their recipe. left_out : names the training prompts and completions that are left out of them.
    """

    workspace: Workspace
    number: int
    start: Policy
    reference: Policy
    row_steps: tuple[BlockStep, ...]
    rewards: quantiles.Rewards
    references: quantiles.Rewards | None
    prompts: Recipe
    left_out: str
    quantiles: Recipe
    training_set: Recipe
    train: Recipe

    def renamed(self) -> Round:
        """The round with its recipes named by the rewards that the store has now."""
        ranked, assembled, trained = _recipes(self)
        return replace(self, quantiles=ranked, training_set=assembled, train=trained)

    def label(self, stage: str) -> str:
        """What a stage is called in this round."""
        return stage if self.number == 1 else f"{stage}, round {self.number}"

    @property
    def logprobs(self) -> LogprobStep:
        """Reference log-probs of the rows that were selected, or will be if all of them are scored."""
        manifest = self.workspace.artifacts.find(self.quantiles)
        rows = self._expected if manifest is None else training_set.wanted_rows(self.workspace, manifest)
        return self._logprobs(rows)

    @property
    def made(self) -> Made:
        """What the store has of a finished round; MissingError names what is absent."""
        get = self.workspace.artifacts.get
        return Made(get(self.quantiles), get(self.training_set), get(self.train))

    def build_quantiles(self) -> Manifest:
        """Select and rank; see `steps.quantiles`."""
        return quantiles.build(self.workspace, self.quantiles, self.rewards, self.references)

    def nothing_to_learn(self) -> ObjectiveError | None:
        """Why what was ranked is not worth a training; None where it is. See `steps.signal`."""
        facts = self.workspace.artifacts.get(self.quantiles).facts
        return signal.nothing_to_learn(self.workspace.experiment, facts)

    def build_training_set(self) -> Manifest:
        """Join what was selected with its tokens and log-probs; see `steps.training_set`."""
        ranked = self.workspace.artifacts.get(self.quantiles)
        return training_set.build(self.workspace, self.training_set, ranked, self.logprobs)

    def _logprobs(self, rows: Wanted | None) -> LogprobStep:
        label = self.label("reference log-probs")
        return LogprobStep(self.rewards.completions, self.reference, label, rows)

    @property
    def _expected(self) -> Wanted | None:
        completions, data = self.rewards.completions, self.workspace.experiment.training_data
        if self.number > 1:
            data = data.model_copy(update={"count": None})
        if not isinstance(completions, SampleStep):
            return None
        counts = completions.wanted.items()
        return {prompt: expected_rows(data, len(rows)) for prompt, rows in counts}


def first_round(workspace: Workspace, reference: Policy, asked: Recipe, found: UsableTables) -> Round:
    """The round on `training_data`. asked : the prompts' recipe. found : what of the prompts is used."""
    table, offline, left_out = found.prompts, found.offline, found.left_out.digest("train")
    experiment = workspace.experiment
    data, train = experiment.training_data, prompts.of_split(table, "train")
    count = experiment.sampling.references_per_prompt
    samples = SampleStep(workspace, reference, train, count, "sample references")
    budget = budgets.read(workspace.objects, samples.recipe, reward_recipe(workspace, samples.texts))
    samples = replace(samples, budget=budget)
    sampled = RewardStep(samples, "score references")
    if data.mode != "offline" or offline is None:
        steps: tuple[BlockStep, ...] = (samples, sampled)
        return _round(workspace, 1, reference, reference, asked, left_out, steps, sampled, sampled)
    own = OfflineCompletions(workspace, reference, train, offline)
    rewards: quantiles.Rewards
    if experiment.decided_data.preference == "label":
        rewards = Unscored(own)  # a reward would decide nothing, and it may cost
    elif data.rewards == "given":
        rewards = GivenRewards(own)
    else:
        rewards = RewardStep(own, "score offline completions")
    steps = (rewards,) if isinstance(rewards, RewardStep) else ()
    if data.references == "offline":
        references: quantiles.Rewards | None = rewards
    elif experiment.objective.kind == "qrpo":
        references, steps = sampled, (samples, sampled, *steps)
    else:
        references = None  # the baselines rank nothing, and drawing references is what costs
    return _round(workspace, 1, reference, reference, asked, left_out, steps, rewards, references)


def next_round(before: Round, asked: Recipe, policy: Policy) -> Round:
    """The round after `before`, on draws from the policy that it made."""
    workspace = before.workspace
    count = workspace.experiment.rounds.samples_per_prompt
    number = before.number + 1
    train = before.rewards.completions.prompts
    samples = SampleStep(workspace, policy, train, count, f"sample, round {number}")
    rewards = RewardStep(samples, f"score, round {number}")
    return _round(
        workspace,
        number,
        policy,
        before.reference,
        asked,
        before.left_out,
        (samples, rewards),
        rewards,
        before.references,
    )


def _round(
    workspace: Workspace,
    number: int,
    start: Policy,
    reference: Policy,
    asked: Recipe,
    left_out: str,
    steps: tuple[BlockStep, ...],
    rewards: quantiles.Rewards,
    references: quantiles.Rewards | None,
) -> Round:
    unnamed = (asked,) * 3
    return Round(
        workspace, number, start, reference, steps, rewards, references, asked, left_out, *unnamed
    ).renamed()


def _recipes(round_: Round) -> tuple[Recipe, Recipe, Recipe]:
    """What names the rank counts, the training set and the policy of a round."""
    workspace, rewards = round_.workspace, round_.rewards
    ranked = quantiles.recipe(workspace, round_.prompts, rewards, round_.references, round_.left_out)
    assembled = training_set.recipe(ranked, LogprobStep(rewards.completions, round_.reference, ""))
    return ranked, assembled, training.recipe(workspace, assembled, round_.start)
