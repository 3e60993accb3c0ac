"""Everything that can be known to be wrong before anything is written or any server is started."""

from __future__ import annotations

from qrpo_core.config import Experiment
from qrpo_core.data.unusable import UNREADABLE, Unusable, UnusableError, unusable_lines
from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.engines.registry import require
from qrpo_core.errors import ConfigError, DataError, QRPOError
from qrpo_core.rewards.worker import kept_workers
from qrpo_core.steps import policies, prompts, usable
from qrpo_core.steps.ranked import fewest_references
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.recipe import Recipe
from qrpo_core.train.launch import require_deepspeed
from qrpo_core.train.lora import check_source, require_peft


def check(workspace: Workspace, progress: Progress = no_progress) -> None:
    """Raise the error that the run would meet; return if there is none that is cheap to find.

    Looks at the model's files (not its weights; for LoRA at its layers, by its config), reads the prompt
    source unless the store has it already, and unless the store knows it sees that every prompt and
    completion can be used and that rewards are to be trusted (`steps.usable`), of which `progress` counts
    the prompts.
    """
    _check_budget(workspace.experiment)
    require(workspace.experiment)
    require_deepspeed(workspace.experiment.training)
    if workspace.experiment.training.lora_rank is not None:
        require_peft()
    source = policies.source_of(workspace)
    if workspace.experiment.training.lora_rank is not None:
        check_source(source, workspace.experiment.training)
    asked = prompts.recipe(workspace)
    with kept_workers():
        try:
            found = prompts.find(workspace, asked)
        except DataError as error:
            raise _with_the_others(workspace, asked, error, progress) from None
        usable.check(workspace, asked, found, progress)
    if found.offline is not None:
        train = set(prompts.of_split(found.prompts, "train")["prompt_id"].to_pylist())
        if train.isdisjoint(found.offline["prompt_id"].to_pylist()):
            raise DataError(
                f"none of the {len(train)} training prompts has a completion of its own",
                where="training_data.mode 'offline'",
                remedy="look at prompts.chosen_field or prompts.completion_fields",
            )


def _with_the_others(workspace: Workspace, asked: Recipe, error: DataError, progress: Progress) -> DataError:
    """The error of rows that cannot be read, and all that is wrong with the others, in one message."""
    experiment = workspace.experiment
    if experiment.prompts.on_unusable == "skip":
        return error  # it is not of single rows
    lenient = experiment.prompts.model_copy(update={"on_unusable": "skip"})
    try:
        left = prompts.read(Workspace(experiment.model_copy(update={"prompts": lenient})))
        tables = prompts.tables_of(workspace, left)
        reference = policies.reference(workspace, policies.source_of(workspace))
        others = usable.known_problems(workspace, asked, tables, reference, progress)
    except QRPOError:
        return error  # without the row nothing is left to look at
    if not others:
        return error
    where, remedy = error.where or "", error.remedy or "mend it"
    single = (Unusable(None, where, error.message, remedy, UNREADABLE),)
    found = [*(error.found if isinstance(error, UnusableError) else single), *others]
    return UnusableError.of(unusable_lines(found), found)


def _check_budget(experiment: Experiment) -> None:
    """Refuse fewer references than the objective can be computed with."""
    data, objective = experiment.training_data, experiment.objective
    count = experiment.sampling.references_per_prompt
    if objective.kind != "qrpo":
        needed = {"pairs": 2, "best_worst": data.pool or 2, "offline": 1}[data.mode]
        why = "a pair needs two completions"
    elif data.mode == "offline" and data.references == "offline":
        return
    else:
        outside = data.pool or 0
        needed = outside + fewest_references(objective)
        why = f"transform {objective.transform!r}, and each is left out of its own comparison"
        why += f", beside a selection pool of {outside}" if outside else ""
    if count < needed:
        raise ConfigError(
            f"sampling.references_per_prompt = {count} is too few",
            where=f"training_data.mode {data.mode!r}, objective.kind {objective.kind!r}",
            remedy=f"set it to {needed} or more ({why})",
        )
