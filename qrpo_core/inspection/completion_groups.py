"""The completions that an experiment has so far, group by group: their source, and who scored them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qrpo_core.pipeline.completions import Completions, OfflineCompletions, Rewards
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.row_steps import LogprobStep, RewardStep
from qrpo_core.pipeline.stage_names import SCORE_OFFLINE_LOGPROBS, SCORE_REFERENCE_LOGPROBS

#: Names of the groups of held-out prompts.
BEFORE, AFTER = "held-out, before", "held-out, after"


@dataclass(frozen=True)
class CompletionGroup:
    """Completions from one source, and their rewards.

    name : references, offline, round 2 and later, held-out before or after training, or a benchmark's.
    ref_logprobs, policy_logprobs : the steps of their log-probs under the reference and the trained policy.
    round_ : the round that trains on them, or None. judges : of the evaluation, by name.
    """

    name: str
    completions: Completions
    rewards: Rewards
    ref_logprobs: LogprobStep | None = None
    policy_logprobs: LogprobStep | None = None
    round_: Round | None = None
    judges: Mapping[str, RewardStep] = field(default_factory=dict)

    @property
    def logprobs(self) -> tuple[LogprobStep, ...]:
        """The steps of their log-probs, the trained policy's first."""
        return tuple(each for each in (self.policy_logprobs, self.ref_logprobs) if each is not None)


def training_groups(steps: ExperimentSteps) -> Iterator[CompletionGroup]:
    """The groups of training prompts, as far as rounds are trained."""
    references = steps.first.references
    if references is not None and references is not steps.first.rewards:
        yield CompletionGroup("references", references.completions, references)
    for round_ in steps.planned_rounds():
        rewards = round_.rewards
        own = isinstance(rewards.completions, OfflineCompletions)
        name = f"round {round_.number}" if round_.number > 1 else "offline" if own else "references"
        scored = LogprobStep(rewards.completions, round_.reference, round_.label(SCORE_REFERENCE_LOGPROBS))
        yield CompletionGroup(name, rewards.completions, rewards, scored, round_=round_)
        if round_.own is not None:
            given = round_.own.completions
            scored = LogprobStep(given, round_.reference, SCORE_OFFLINE_LOGPROBS)
            yield CompletionGroup("offline", given, round_.own, scored, round_=round_)


def held_out_groups(steps: ExperimentSteps) -> Iterator[CompletionGroup]:
    """The groups of held-out prompts; those after training once the last round is trained."""
    before = steps.before
    yield CompletionGroup(BEFORE, before.samples, before.rewards, judges=before.judges)
    last = _trained(steps)
    if last is not None:
        end = steps.after(last)
        scored = end.divergence
        yield CompletionGroup(
            AFTER,
            end.after.samples,
            end.after.rewards,
            scored.reference,
            scored.policy,
            judges=end.after.judges,
        )


def benchmark_groups(steps: ExperimentSteps) -> Iterator[CompletionGroup]:
    """The groups of the benchmarks; those after training once the last round is trained."""
    for each in steps.benchmarks:
        side = each.before
        yield CompletionGroup(f"benchmark {each.name}, before", side.samples, side.rewards)
    last = _trained(steps) if steps.benchmarks else None
    if last is not None:
        for tested in steps.after(last).benchmarks:
            after = tested.after
            yield CompletionGroup(f"benchmark {tested.name}, after", after.samples, after.rewards)


def _trained(steps: ExperimentSteps) -> Round | None:
    """The last round, if its policy is in the store."""
    *_, last = steps.planned_rounds()
    whole = last.number == steps.workspace.experiment.rounds.count
    return last if whole and steps.workspace.artifacts.find(last.train_recipe) is not None else None
