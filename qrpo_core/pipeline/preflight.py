"""Checks of an experiment, before anything is written or a server is started."""

from __future__ import annotations

from qrpo_core.common import local_copies
from qrpo_core.common.errors import ConfigError, DataError, QRPOError
from qrpo_core.common.extras import require
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config import Experiment
from qrpo_core.data.unusable import UNREADABLE, Unusable, UnusableError, unusable_lines
from qrpo_core.engines.kinds import kind_of
from qrpo_core.pipeline import benchmarks, policies, prompts, usable_rows
from qrpo_core.pipeline.ranked import target_objective
from qrpo_core.pipeline.tracker_checks import check_trackers
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.rewards.verifiable.scorer_process import kept_workers
from qrpo_core.store.recipe import Recipe
from qrpo_core.training.launch import require_deepspeed
from qrpo_core.training.lora import check_targets_of_source


def check(workspace: Workspace, progress: Progress = no_progress, *, runs: bool = True) -> None:
    """Raise the first error that the run would meet and that is cheap to find.

    It checks the extras, the model's files (not its weights; for LoRA its layers, by its config) and the
    prompt source, unless the store has it. Unless the store has the result, it also checks that every prompt
    and completion can be used and that rewards can be trusted (`pipeline.usable_rows`).
    progress : counts the prompts of that last check. runs : whether something will run here; then the servers
    of trackers are reached, and vLLM and the packages of the training must be there.
    """
    check_settings(workspace, runs=runs)
    if runs:
        check_trackers(workspace.experiment.training)
    prompts_recipe = prompts.recipe(workspace)
    with kept_workers():
        try:
            found = prompts.find(workspace, prompts_recipe)
        except DataError as error:
            raise _with_the_others(workspace, prompts_recipe, error, progress) from None
        usable_rows.check(workspace, prompts_recipe, found, progress)
        benchmarks.check(workspace, progress)
    if found.offline is not None:
        train = set(prompts.of_split(found.prompts, "train")["prompt_id"].to_pylist())
        if train.isdisjoint(found.offline["prompt_id"].to_pylist()):
            raise DataError(
                f"none of the {len(train)} training prompts has a completion of its own",
                where=f"training_data.mode {workspace.experiment.training_data.mode!r}",
                remedy="look at prompts.chosen_field or prompts.completion_fields",
            )


def check_settings(workspace: Workspace, *, runs: bool = True) -> None:
    """The part of `check` that reads no prompt: the budget, the extras and the model's files."""
    _check_budget(workspace.experiment)
    local_copies.limit()
    if not runs:
        policies.source_of(workspace)
        return
    kind_of(workspace.experiment).require(workspace.experiment)
    require_deepspeed(workspace.experiment.training)
    if workspace.experiment.training.lora_rank is not None:
        require("peft", "training.lora_rank")
    source = policies.source_of(workspace)
    if source.kind == "gguf":
        require("gguf", "reading a GGUF file", where="model.path")
    if workspace.experiment.training.lora_rank is not None:
        check_targets_of_source(source, workspace.experiment.training)


def _with_the_others(
    workspace: Workspace, prompts_recipe: Recipe, error: DataError, progress: Progress
) -> DataError:
    """One error with the rows that cannot be read and the problems of all other rows."""
    experiment = workspace.experiment
    if experiment.prompts.on_unusable == "skip":
        return error  # unreadable rows are skipped, so the error is about the whole source
    lenient = experiment.prompts.model_copy(update={"on_unusable": "skip"})
    try:
        left = prompts.read(Workspace(experiment.model_copy(update={"prompts": lenient})))
        tables = prompts.tables_of(workspace, left)
        reference = policies.reference(workspace, policies.source_of(workspace))
        others = usable_rows.known_problems(workspace, prompts_recipe, tables, reference, progress)
    except QRPOError:
        return error  # the other rows cannot be checked either
    if not others:
        return error
    where, remedy = error.where or "", error.remedy or "mend it"
    single = (Unusable(None, where, error.message, remedy, UNREADABLE),)
    found = [*(error.found if isinstance(error, UnusableError) else single), *others]
    return UnusableError.of(unusable_lines(found), found)


def _check_budget(experiment: Experiment) -> None:
    """Raises ConfigError if the experiment draws too few references for its objective."""
    data, objective = experiment.training_data, experiment.objective
    count = experiment.sampling.references_per_prompt
    if not objective.has_targets:
        needed = {"pairs": 2, "best_worst": data.pool or 2, "offline": 1, "mixed": 1}[data.mode]
        why = "a pair needs two completions"
    elif data.mode == "offline" and data.references == "offline":
        return
    else:
        outside = data.pool or 0
        kind = target_objective(objective)
        needed = outside + kind.fewest_references
        why = f"{kind.needs_them}, and each is left out of its own comparison"
        why += f", beside a selection pool of {outside}" if outside else ""
    if count < needed:
        raise ConfigError(
            f"sampling.references_per_prompt = {count} is too few",
            where=f"training_data.mode {data.mode!r}, objective.kind {objective.kind!r}",
            remedy=f"set it to {needed} or more ({why})",
        )
