"""Why a stage has something to compute, in the words of the experiment file.

A recipe is compared with the most similar one that the store has. What changed is named as the user knows
it: a setting of the file (`sampling.temperature changed`), a file (`questions.jsonl changed`), or the stage
before (`the rewards are new`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.store.recipe import Recipe

#: Changes that are named before the others are only counted.
_NAMED = 4

#: The section of the experiment that a step's settings are of.
_SECTIONS = {"prompts": "prompts", "sample": "sampling", "evaluate": "evaluation"}

#: Fields of recipes that stand in another section than the step's, or in none.
_FIELDS = {
    "dtype": "model.dtype changed",
    "chat_template_kwargs": "model.chat_template_kwargs changed",
    "date": "the date in the chat template changed",
    "shown": "the marks of thinking that stay in the text changed",
    "left_out": "other rows are left out",
    "retryable": "rows were tried again",
    "retryable_references": "rows were tried again",
    "precision": "training.precision or the dtype of its weights changed",
    "temperature": "the temperature changed",
    "weights_dtype": "training.weights_dtype changed",
    "name": "name changed",
    "max_new_tokens": "sampling.max_new_tokens changed",
    "engine": "sampling.engine changed",
    "vllm_max_length": "vllm.max_length changed",
    "offline": "training_data.mode changed",
    "sampled": "training_data changed",
    "rows": "the number of completions changed",
    "references": "the number of references changed",
    "reward": "reward changed",
    "judges": "evaluation.judges changed",
    "truncated_warning": "training_data.truncated_warning changed",
}

_INPUTS = {
    "policy": "the policy is another",
    "source": "the model is another",
    "completions": "its completions are new",
    "prompts": "the prompts are new",
    "rewards": "the rewards are new",
    "references": "the rewards are new",
    "quantiles": "the quantiles are new",
    "logprobs": "the log-probs are new",
    "training_set": "the training set is new",
    "train": "the policy is new",
    "evaluate": "the evaluation is new",
}


def changed(
    experiment: Experiment, recipe: Recipe, others: list[dict[str, Any]], scorer: RewardConfig | None = None
) -> str:
    """In which settings and files a recipe differs from the most similar stored one of its step.

    scorer : of a stage of rewards, else None.
    """
    found = [recipe.differences(other) for other in others if other != recipe.to_dict()]
    if not found:
        return "not computed yet"
    nearest = min(found, key=lambda names: (len(names), sum(each.startswith("inputs.") for each in names)))
    causes = [each for each in nearest if not each.startswith("inputs.")]
    words = list(
        dict.fromkeys(_in_words(experiment, recipe.step, each, scorer) for each in causes or nearest)
    )
    return ", ".join(words[:_NAMED]) + (f", and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _in_words(experiment: Experiment, step: str, field: str, scorer: RewardConfig | None) -> str:
    first, _, name = field.partition(".")
    top, _, rest = name.partition(".")
    if first == "version":
        return "this version of qrpo computes it differently"
    if first == "inputs":
        return _INPUTS.get(name, "what it is made from is new")
    if step == "prompts" and top == "source":
        return _source(experiment, rest)
    if step == "reward":
        return _reward(experiment, scorer or experiment.reward, name)
    section = _SECTIONS.get(step, "")
    if section and top in type(getattr(experiment, section)).model_fields:
        return f"{section}.{top} changed"
    if top in ("training_data", "objective", "training", "pool_report") and rest:
        return f"{top}.{rest.partition('.')[0]} changed"
    return _FIELDS.get(top, f"{name} changed")


def _source(experiment: Experiment, part: str) -> str:
    """What the prompts are read from: a file or data set by its name."""
    if part == "reasoning_gym":
        return "reasoning-gym has another version"
    given = experiment.prompts.path or experiment.prompts.name or "the source"
    return f"{PurePath(given).name} changed"


def _reward(experiment: Experiment, scorer: RewardConfig, name: str) -> str:
    """A field of `rewards.registry.reward_identity`, by the setting or file that it stands for."""
    top, _, rest = name.partition(".")
    if top == "config":
        where = "reward" if scorer == experiment.reward else "the judge's"
        return f"{where}{'.' if where == 'reward' else ' '}{rest} changed" if rest else f"{where} changed"
    if top == "identities":
        files = sorted({_file(each.python.function) for each in _terms(scorer) if each.python is not None})
        models = sorted({PurePath(each.model.path).name for each in _terms(scorer) if each.model is not None})
        return f"{' or '.join([*files, *models]) or 'what decides its scores'} changed"
    if top == "libraries" and rest:
        return f"{rest} has another version"
    return "this version of qrpo scores differently"


def _file(function: str) -> str:
    """The file of `my_rewards:score` or `my_rewards.py:score`, by name."""
    module = function.partition(":")[0]
    return PurePath(module).name if module.endswith(".py") else f"{module.rpartition('.')[2]}.py"


def _terms(scorer: RewardConfig) -> Iterator[RewardConfig]:
    yield scorer
    for term in scorer.terms:
        yield from _terms(term.reward)
