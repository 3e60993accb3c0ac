"""A round of an experiment: everything before its training, and its training."""

from __future__ import annotations

from qrpo_core.steps import prompts, training, usable
from qrpo_core.steps.chain import stored_reference
from qrpo_core.steps.rounds import Round
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe
from tasks.blocks import Compute, fill, in_this_run, mended
from tasks.progress import stage_progress
from tasks.stages import Stage, make


def check_rows(workspace: Workspace, asked: Recipe) -> Stage:
    """See that every prompt and completion can be used, or which cannot. asked : the prompts' recipe."""
    reference = stored_reference(workspace)

    def build() -> Manifest:
        tables = prompts.stored(workspace, workspace.artifacts.get(asked))
        with stage_progress("check rows", len(tables.prompts), "prompts") as advance:
            return usable.build(workspace, asked, tables, reference, advance)

    return make(workspace, "check rows", usable.recipe(workspace, asked, reference), build)


def prepare(workspace: Workspace, round_: Round, compute: Compute = in_this_run) -> list[Stage]:
    """Everything of a round before its training. compute : who computes its missing rows.

    Where the rewards say nothing that could be learned it ends with the rank counts: no log-probs are bought
    for a training that `refuse` refuses.
    """
    return mended(lambda: _prepare(workspace, round_, compute))


def _prepare(workspace: Workspace, round_: Round, compute: Compute) -> list[Stage]:
    label = round_.label
    stages = [fill(workspace, step, compute) for step in round_.row_steps]
    round_ = round_.renamed()  # by what the rewards have become
    stages.append(make(workspace, label("quantiles"), round_.quantiles, round_.build_quantiles))
    if round_.nothing_to_learn() is not None:
        return stages
    stages.append(fill(workspace, round_.logprobs, compute))
    stages.append(make(workspace, label("training set"), round_.training_set, round_.build_training_set))
    return stages


def refuse(round_: Round) -> None:
    """Raise ObjectiveError where the rank counts of a round say that nothing could be learned."""
    if (problem := round_.nothing_to_learn()) is not None:
        raise problem


def fit(workspace: Workspace, round_: Round) -> Stage:
    """The training of a round; one that was interrupted goes on from its last checkpoint."""
    refuse(round_)

    def build() -> Manifest:
        data = workspace.artifacts.get(round_.training_set)
        examples = training.example_count(workspace, data)
        steps = training.optimiser_steps(workspace.experiment.training, examples)
        with stage_progress(round_.label("train"), steps, "steps") as advance:
            done = 0

            def on_step(step: int, total: int, logs: dict[str, float]) -> None:
                nonlocal done
                advance(step - done)
                done = step

            return training.build(workspace, round_.train, data, round_.start, on_step)

    return make(workspace, round_.label("train"), round_.train, build)
