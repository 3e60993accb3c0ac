"""The plan of a comparison: which trainings and evaluations the store lacks. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.formatting import duration
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.inspection.memory import check_memory, policy_shape
from qrpo_core.inspection.space import policy_bytes, space_line
from qrpo_core.maintenance.in_use import known_prompts, steps_of
from qrpo_core.pipeline.comparison import groups
from qrpo_core.pipeline.evaluation import EvaluationSteps
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.variants import Variant
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.text_table import table
from qrpo_core.store.manifest import Manifest

#: What the store has of a training: nothing, its policy, or its evaluation too.
State = Literal["to train", "to evaluate", "cached"]

#: Settings of a training that its memory does not depend on.
_SAME_MEMORY = {
    *("seed", "learning_rate", "epochs", "warmup_ratio", "schedule", "weight_decay", "max_grad_norm"),
    *("temperature", "lora_alpha", "checkpoint_minutes", "report_to"),
}


@dataclass(frozen=True)
class PlannedVariant:
    """A variant and the state of its training with each seed.

    seconds : those of its stored trainings. later : of the trainings that would follow if it were chosen, how
    many the store lacks.
    """

    variant: Variant
    states: dict[int, State]
    seconds: tuple[float, ...]
    later: int


def seeds_of(variants: Sequence[Variant], config: ComparisonConfig) -> tuple[range, range]:
    """The training seeds to choose by (none where nothing is chosen), and those to compare with.

    Raises ConfigError where they go beyond the largest seed.
    """
    first = variants[0].experiment.training.seed
    chosen_at = first + (config.choose_seeds if config.choose_on == "validation" else 0)
    if (last := chosen_at + config.seeds - 1) >= 2**32:
        raise ConfigError(
            f"the last training seed would be {last}, and the largest is {2**32 - 1}",
            where=f"training.seed {first}",
            remedy="lower training.seed or --seeds",
        )
    return range(first, chosen_at), range(chosen_at, chosen_at + config.seeds)


def finished(steps: ExperimentSteps) -> EvaluationSteps | None:
    """The evaluation of an experiment if the store has it and no row of it is to be tried again."""
    workspace = steps.workspace
    if _trained(steps) is None:
        return None
    *_, last = steps.planned_rounds()
    end = steps.after(last)
    if workspace.artifacts.find(end.evaluate) is None:
        return None
    missing = workspace.blocks.missing
    return None if any(missing(step.recipe, step.wanted).row_count for step in end.after) else end


def plan_comparison(
    workspace: Workspace, variants: Sequence[Variant], config: ComparisonConfig
) -> list[PlannedVariant]:
    """The state of every training. With a choice: of those that it is made by (`seeds_of`)."""
    asked, tables = known_prompts(workspace)
    choosing, comparing = seeds_of(variants, config)
    part = HeldOutPart.of(config, "validation")
    planned = []
    for variant in variants:
        states: dict[int, State] = {}
        seconds = []
        for seed in choosing or comparing:
            own = workspace.beside(variant.with_seed(seed))
            steps = steps_of(own, asked, tables).on_part(part)
            made = _trained(steps)
            if made is None:
                states[seed] = "to train"
                continue
            seconds.append(made.seconds)
            states[seed] = "to evaluate" if finished(steps) is None else "cached"
        followed = (workspace.beside(variant.with_seed(seed)) for seed in (comparing if choosing else ()))
        later = sum(_trained(steps_of(own, asked, tables)) is None for own in followed)
        planned.append(PlannedVariant(variant, states, tuple(seconds), later))
    return planned


def _trained(steps: ExperimentSteps) -> Manifest | None:
    """The last round's policy, if the store has it."""
    *_, last = steps.planned_rounds()
    if last.number < steps.workspace.experiment.rounds.count:
        return None
    return steps.workspace.artifacts.find(last.train_recipe)


def check_variants_memory(
    workspace: Workspace, planned: Sequence[PlannedVariant], config: ComparisonConfig, *, pooled: bool
) -> None:
    """Raise ConfigError, which names the variant, where one cannot fit on this machine's GPUs.

    pooled : whether workers compute the rows before training. Of variants that need the same memory one is
    checked.
    """
    checked = set()
    _, (later, *_) = seeds_of([each.variant for each in planned], config)
    for each in planned:
        seed, state = next(
            ((seed, state) for seed, state in each.states.items() if state != "cached"), (later, "cached")
        )
        experiment = each.variant.with_seed(seed)
        training = experiment.training.model_dump_json(exclude=_SAME_MEMORY)
        needs = state, training, experiment.objective.pairwise, experiment.training_data, experiment.rounds
        if needs not in checked:
            checked.add(needs)
            check_memory(workspace.beside(experiment), "compare", pooled=pooled, of=each.variant.name)


def comparison_plan_lines(
    workspace: Workspace, planned: Sequence[PlannedVariant], config: ComparisonConfig
) -> list[str]:
    """A table of the variants, what is to train and to evaluate, and the space that it takes."""
    rows = [("variant", "seeds", "to train", "to evaluate", "cached", "left out of the file's settings")]
    sums: Counter[State] = Counter()
    for each in planned:
        counts = Counter(each.states.values())
        sums += counts
        seeds = f"{min(each.states)} to {max(each.states)}" if len(each.states) > 1 else f"{min(each.states)}"
        train, evaluate, cached = counts["to train"], counts["to evaluate"], counts["cached"]
        numbers = f"{train}", f"{evaluate}", f"{cached}"
        rows.append((each.variant.name, seeds, *numbers, ", ".join(each.variant.dropped)))
    trainings, evaluations = sums["to train"], sums["to train"] + sums["to evaluate"]
    total = f"To compute: {trainings} trainings and {evaluations} evaluations; {sums['cached']} are cached."
    seconds = [each for row in planned for each in row.seconds]
    if trainings and seconds:
        total += f" The stored trainings took {duration(sum(seconds) / len(seconds))} each."
    lines = [*table(rows), "", total]
    if config.choose_on == "validation":
        fewest = sum(min(each.later for each in group) for group in _choices(planned, config))
        lines.append(
            f"These choose one variant of each {', '.join(config.choose_within)}; {config.seeds} further "
            "trainings and evaluations of each chosen one follow "
            f"(at least {fewest} of these trainings are still to run)."
        )
    if added := _policies_bytes(workspace, planned, config):
        lines.append(space_line(added, workspace.objects.free_bytes()))
    return lines


def _policies_bytes(
    workspace: Workspace, planned: Sequence[PlannedVariant], config: ComparisonConfig
) -> float:
    """Bytes of the policies that are still to be trained, which are nearly all that a comparison adds.

    Of each choice, the variant that adds least. 0 where the size of the model is not known.
    """
    if (shape := policy_shape(workspace)) is None:
        return 0.0

    def size(each: PlannedVariant) -> float:
        experiment = each.variant.experiment
        return experiment.rounds.count * policy_bytes(shape.parameters, experiment.training.save_dtype)

    added = sum(size(each) * list(each.states.values()).count("to train") for each in planned)
    for group in _choices(planned, config):
        added += min(each.later * size(each) for each in group)
    return added


def _choices(planned: Sequence[PlannedVariant], config: ComparisonConfig) -> list[list[PlannedVariant]]:
    """The variants of which one each is chosen; none where nothing is chosen."""
    if config.choose_on != "validation":
        return []
    by_name = {each.variant.name: each for each in planned}
    found = groups(config, [each.variant for each in planned])
    return [[by_name[name] for name in names] for names in found.values()]
