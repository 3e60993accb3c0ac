"""One round of training: its completions, their references, and the policy that it starts from.

The first round trains on the completions of `training_data`. Each later round samples from the policy of the
round before and ranks its samples among the same references. Reference log-probs are always those of the
reference policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.pipeline import (
    budgets,
    learning_signal,
    prompts,
    rank_counts,
    sampler_logprobs,
    training,
    training_set,
)
from qrpo_core.pipeline.completions import GivenRewards, OfflineCompletions, Rewards, Unscored
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_recipes import reward_recipe
from qrpo_core.pipeline.row_steps import BlockStep, LogprobStep, RewardStep, SampleStep
from qrpo_core.pipeline.selection import expected_rows
from qrpo_core.pipeline.stage_names import (
    ANNOTATE_COMPLETIONS,
    ANNOTATE_OFFLINE,
    ANNOTATE_REFERENCES,
    SAMPLE_COMPLETIONS,
    SAMPLE_REFERENCES,
    SCORE_OFFLINE_LOGPROBS,
    SCORE_REFERENCE_LOGPROBS,
    in_round,
)
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.usable_rows import UsableTables
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.blocks.planning import Wanted
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe


@dataclass(frozen=True)
class RoundArtifacts:
    """The artifacts of a finished round."""

    quantiles: Manifest
    training_set: Manifest
    train: Manifest


@dataclass(frozen=True)
class Round:
    """The steps and recipes of a round.

    number : 1, 2, ... start : the policy that training starts from.
    row_steps : the steps that sample and score before the ranking.
    references : the rewards that `rewards` are ranked among. The same object if the completions are
        themselves references, as in mode random. None if nothing is ranked, as for dpo in mode offline.
    own : in mode mixed, those of the data set's completions, which are trained on beside `rewards`.
    prompts_recipe : the recipe of the prompts. left_out : a digest of the training rows that are left out.
    """

    workspace: Workspace
    number: int
    start: Policy
    reference: Policy
    row_steps: tuple[BlockStep, ...]
    rewards: Rewards
    references: Rewards | None
    prompts_recipe: Recipe
    left_out: str
    quantiles_recipe: Recipe
    training_set_recipe: Recipe
    train_recipe: Recipe
    own: Rewards | None = None

    def with_current_rewards(self) -> Round:
        """The round with the recipes that follow from the rewards in the store now."""
        ranked, assembled, trained = _recipes(self)
        return replace(self, quantiles_recipe=ranked, training_set_recipe=assembled, train_recipe=trained)

    def label(self, stage: str) -> str:
        """The name of a stage in this round."""
        return in_round(stage, self.number)

    @property
    def logprob_steps(self) -> tuple[LogprobStep, ...]:
        """The steps that compute reference log-probs: `logprobs`, and that of `own`."""
        if self.own is None:
            return (self.logprobs,)
        manifest = self.workspace.artifacts.find(self.quantiles_recipe)
        if manifest is None:
            rows: Wanted = {prompt: indices[:1] for prompt, indices in self.own.completions.wanted.items()}
        else:
            rows = training_set.selected_rows(self.workspace, manifest, in_pool=False)
        return self.logprobs, LogprobStep(self.own.completions, self.reference, SCORE_OFFLINE_LOGPROBS, rows)

    @property
    def logprobs(self) -> LogprobStep:
        """The step that computes reference log-probs of the selected `rewards`, or of those to compare.

        If the quantiles are not there yet (in `qrpo plan`), an estimate of the rows.
        """
        manifest = self.workspace.artifacts.find(self.quantiles_recipe)
        only = None if self.own is None else True
        rows = self._expected
        if manifest is not None:
            rows = training_set.selected_rows(self.workspace, manifest, in_pool=only)
        compared = sampler_logprobs.rows_to_compare(self.workspace.experiment, self.number)
        if compared and rows is not None:
            samples = self.rewards.completions if manifest is not None else None
            rows = sampler_logprobs.some_of_each_engine(samples, rows, compared)
        return self._logprobs(rows)

    @property
    def artifacts(self) -> RoundArtifacts:
        """The artifacts of a finished round; MissingError if one is absent."""
        get = self.workspace.artifacts.get
        return RoundArtifacts(
            get(self.quantiles_recipe), get(self.training_set_recipe), get(self.train_recipe)
        )

    def build_quantiles(self) -> Manifest:
        """Select and rank; see `pipeline.rank_counts`."""
        return rank_counts.build(
            self.workspace, self.quantiles_recipe, self.rewards, self.references, self.own
        )

    def nothing_to_learn(self) -> ObjectiveError | None:
        """The reason not to train on the rank counts, or None. See `pipeline.learning_signal`."""
        facts = self.workspace.artifacts.get(self.quantiles_recipe).facts
        return learning_signal.nothing_to_learn(self.workspace.experiment, facts)

    def build_training_set(self) -> Manifest:
        """Join the selected rows with their tokens and log-probs; see `pipeline.training_set`."""
        ranked = self.workspace.artifacts.get(self.quantiles_recipe)
        return training_set.build(self.workspace, self.training_set_recipe, ranked, self.logprob_steps)

    def check_reference_logprobs(self) -> str:
        """What was measured of the sampler's log-probs; "" where the training model's are taken.

        Raises EngineError where they are too far from the training model's.
        """
        if not sampler_logprobs.rows_to_compare(self.workspace.experiment, self.number):
            return ""
        data = derive(self.workspace, self.workspace.artifacts.get(self.training_set_recipe))
        sampler_logprobs.refuse_far(data.compared, self.workspace.experiment.parity.reference_limit)
        return sampler_logprobs.summary(data.compared)

    def _logprobs(self, rows: Wanted | None) -> LogprobStep:
        label = self.label(SCORE_REFERENCE_LOGPROBS)
        return LogprobStep(self.rewards.completions, self.reference, label, rows)

    @property
    def _expected(self) -> Wanted | None:
        completions, data = self.rewards.completions, self.workspace.experiment.training_data
        if self.number > 1:
            data = data.model_copy(update={"count": None})
        if not isinstance(completions, SampleStep):
            return None
        found = {prompt: expected_rows(data, len(rows)) for prompt, rows in completions.wanted.items()}
        if self.own is None:
            return found
        return {prompt: rows for prompt, rows in found.items() if prompt in self.own.completions.wanted}


def first_round(
    workspace: Workspace, reference: Policy, prompts_recipe: Recipe, found: UsableTables
) -> Round:
    """The round that trains on `training_data`."""
    table, offline, left_out = found.prompts, found.offline, found.left_out.digest("train")
    experiment = workspace.experiment
    data, train = experiment.training_data, prompts.of_split(table, "train")
    count = experiment.sampling.references_per_prompt
    samples = SampleStep(workspace, reference, train, count, SAMPLE_REFERENCES)
    budget = budgets.read(workspace.objects, samples.recipe, reward_recipe(workspace, samples.texts))
    samples = replace(samples, budget=budget)
    sampled = RewardStep(samples, ANNOTATE_REFERENCES)
    steps: tuple[BlockStep, ...] = (samples, sampled)
    if not data.uses_data_set or offline is None:
        return _round(workspace, 1, reference, reference, prompts_recipe, left_out, steps, sampled, sampled)
    own = OfflineCompletions(workspace, reference, train, offline)
    rewards: Rewards
    if experiment.decided_data.preference == "label":
        rewards = Unscored(own)  # a reward would decide nothing, and it may cost
    elif data.rewards == "given":
        rewards = GivenRewards(own)
    else:
        rewards = RewardStep(own, ANNOTATE_OFFLINE)
    scored = (rewards,) if isinstance(rewards, RewardStep) else ()
    if data.mode == "mixed":
        made = _round(
            workspace, 1, reference, reference, prompts_recipe, left_out, (*steps, *scored), sampled, sampled
        )
        return replace(made, own=rewards).with_current_rewards()
    if data.references == "offline":
        references: Rewards | None = rewards
        steps = scored
    elif experiment.objective.has_targets:
        references, steps = sampled, (*steps, *scored)
    else:
        steps = scored
        references = None  # the baselines rank nothing, and drawing references is what costs
    return _round(workspace, 1, reference, reference, prompts_recipe, left_out, steps, rewards, references)


def next_round(before: Round, prompts_recipe: Recipe, policy: Policy) -> Round:
    """The round after `before`, on samples from its policy."""
    workspace = before.workspace
    count = workspace.experiment.rounds.samples_per_prompt
    number = before.number + 1
    train = before.rewards.completions.prompts
    samples = SampleStep(workspace, policy, train, count, in_round(SAMPLE_COMPLETIONS, number))
    rewards = RewardStep(samples, in_round(ANNOTATE_COMPLETIONS, number))
    return _round(
        workspace,
        number,
        policy,
        before.reference,
        prompts_recipe,
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
    prompts_recipe: Recipe,
    left_out: str,
    steps: tuple[BlockStep, ...],
    rewards: Rewards,
    references: Rewards | None,
) -> Round:
    # Placeholders: a round's recipes follow from its other fields, so the round is made first.
    unnamed = (prompts_recipe,) * 3
    return Round(
        workspace, number, start, reference, steps, rewards, references, prompts_recipe, left_out, *unnamed
    ).with_current_rewards()


def _recipes(round_: Round) -> tuple[Recipe, Recipe, Recipe]:
    """The recipes of the rank counts, the training set and the policy of a round."""
    workspace, rewards = round_.workspace, round_.rewards
    ranked = rank_counts.recipe(
        workspace, round_.prompts_recipe, rewards, round_.references, round_.left_out, round_.own
    )
    compared = sampler_logprobs.rows_to_compare(workspace.experiment, round_.number)
    logprobs = LogprobStep(rewards.completions, round_.reference, "")
    own = None if round_.own is None else LogprobStep(round_.own.completions, round_.reference, "")
    assembled = training_set.recipe(ranked, logprobs, own, compared=compared)
    return ranked, assembled, training.recipe(workspace, assembled, round_.start)
