"""The variants of an experiment: what a comparison trains, and their names.

A setting of the experiment's file that does not belong to a variant's objective is left out of that variant
(a `transform` says nothing to dpo). A setting that is varied and does not belong is an error: it would train
the same policy under two names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import apply_override, parse_experiment
from qrpo_core.config.section import cache_key_fields
from qrpo_core.objective.normalisers import AUTO
from qrpo_core.objective_kinds import KINDS
from qrpo_core.pipeline.preflight import check_settings
from qrpo_core.pipeline.workspace import Workspace

#: Settings that leave the pool and the evaluation as they are. Others make other prompts, samples or rewards.
VARIABLE = ("objective.", "training.", "training_data.", "rounds.", "sampling.references_per_prompt")

#: The commas between values, which those of a list [a, b] are not.
_COMMA = re.compile(r",(?![^\[]*\])")

#: The remedy where some objectives lack what others have.
_BIND = (
    "bind settings to their objective with --variant, such as --variant 'objective.kind=simpo "
    "objective.beta=2,10'; training_data.mode pairs suits every objective"
)

#: Key → value, as text.
Settings = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """One variant of the experiment.

    name : its settings in short, as tables show them. settings : what it sets, by key.
    dropped : the settings of the experiment's file that do not belong to its objective.
    """

    name: str
    settings: Settings
    experiment: Experiment
    dropped: tuple[str, ...]

    def with_seed(self, seed: int) -> Experiment:
        """The experiment with another training.seed."""
        training = self.experiment.training.model_copy(update={"seed": seed})
        return self.experiment.model_copy(update={"training": training})


def expand(experiment: Experiment, comparison: ComparisonConfig) -> tuple[Variant, ...]:
    """Every variant, in the order of the command line. ConfigError names all that cannot be configured."""
    grids = [_grid(text, "--variant") for text in comparison.variants] or [{}]
    shared: dict[str, list[str]] = {}
    for text in comparison.vary:
        shared |= _disjoint(shared, _grid(text, "--vary"))
    wanted: list[Settings] = []
    for grid in grids:
        wanted += _combinations(_disjoint(shared, grid) | shared)
    keys = list(dict.fromkeys(key for settings in wanted for key in settings))
    _refuse_keys(keys)
    names = _names(keys, wanted)
    made, problems = [], []
    for name, settings in zip(names, wanted, strict=True):
        try:
            made.append(_variant(experiment, name, settings))
        except ConfigError as error:
            problems.append(f"{name}: {error.message}" + (f" ({error.remedy})" if error.remedy else ""))
    if problems := [*problems, *_repeated(made)]:
        raise ConfigError(
            f"{len(problems)} of {len(wanted)} variants cannot be compared: {'; '.join(problems)}",
            remedy=_BIND if "objective.kind" in keys else "correct or remove them",
        )
    _one_pool(made)
    return tuple(made)


def check_variants(workspace: Workspace, variants: Sequence[Variant]) -> None:
    """Check the settings of every variant; one ConfigError names all that a training would refuse."""
    problems = []
    for variant in variants:
        try:
            check_settings(workspace.beside(variant.experiment))
        except QRPOError as error:
            problems.append(f"{variant.name}: {error}")
    if problems:
        raise ConfigError(
            f"{len(problems)} of {len(variants)} variants cannot be trained: {'; '.join(problems)}"
        )


def _grid(text: str, option: str) -> dict[str, list[str]]:
    """The values of each key in `key=value,value key=value`."""
    found: dict[str, list[str]] = {}
    for part in text.split():
        key, sign, values = part.partition("=")
        listed = _COMMA.split(values)
        if not (sign and key and all(listed)):
            raise ConfigError(
                f"cannot read {option} {text!r}", remedy="write it as section.field=VALUE,VALUE"
            )
        found |= _disjoint(found, {key: listed})
    if not found:
        raise ConfigError(
            f"{option} {text!r} names no setting", remedy="write it as section.field=VALUE,VALUE"
        )
    return found


def _disjoint(known: Mapping[str, Sequence[str]], more: dict[str, list[str]]) -> dict[str, list[str]]:
    if twice := sorted(known.keys() & more.keys()):
        raise ConfigError(f"{twice[0]} is varied twice", remedy="list all of its values once")
    return more


def _combinations(grid: Mapping[str, Sequence[str]]) -> Iterator[Settings]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _refuse_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if key == "training.seed":
            raise ConfigError("training.seed is varied by --seeds", remedy="remove it")
        if not key.startswith(VARIABLE):
            raise ConfigError(
                f"{key} cannot be varied: variants share one pool, so their prompts, samples, rewards and "
                "evaluation are the same",
                remedy=f"vary {', '.join(each.rstrip('.') for each in VARIABLE)}",
            )


def _names(keys: Sequence[str], wanted: Sequence[Settings]) -> list[str]:
    """A short name of each variant: the last parts of its keys with their values; the kind stands alone."""
    last = Counter(key.rpartition(".")[2] for key in keys)

    def part(key: str, value: str) -> str:
        if key == "objective.kind":
            return value
        short = key.rpartition(".")[2]
        return f"{short if last[short] == 1 else key} {value}"

    order = sorted(keys, key=lambda key: key != "objective.kind")
    return [", ".join(part(key, settings[key]) for key in order if key in settings) for settings in wanted]


def _variant(experiment: Experiment, name: str, settings: Settings) -> Variant:
    """The variant with these settings. ConfigError for settings that do not belong together."""
    data = experiment.model_dump(mode="json", exclude_defaults=True) | {"name": experiment.name}
    objective = data.get("objective", {})
    kind = KINDS.get(settings.get("objective.kind", experiment.objective.kind))
    own = objective.keys() if kind is None else kind.takes()
    dropped = tuple(f"objective.{field}" for field in objective if field not in own)
    for key in dropped:
        del objective[key.removeprefix("objective.")]
    for key, value in settings.items():
        apply_override(data, f"{key}={value}", "--vary")
    return Variant(name, settings, parse_experiment(data, where=name), dropped)


def _repeated(made: Sequence[Variant]) -> list[str]:
    first: dict[str, str] = {}
    found = []
    for variant in made:
        same = first.setdefault(_policy(variant.experiment), variant.name)
        if same is not variant.name:
            found.append(f"{variant.name} trains the same policy as {same}")
    return found


def _policy(experiment: Experiment) -> str:
    """What decides the policy among the settings that vary, as text: those that recipes hold."""
    training, data, kind = experiment.training, experiment.training_data, KINDS[experiment.objective.kind]
    sections = experiment.objective, training, experiment.decided_data, experiment.rounds
    objective, *others = (cache_key_fields(section) for section in sections)
    objective = {name: value for name, value in objective.items() if name not in kind.only_logged}
    if objective["normaliser"] == "auto":
        objective["normaliser"] = AUTO
    numerics = [training.trained_dtype, training.arithmetic, experiment.training_temperature]
    samples = [data.reference_logprobs, experiment.sampling.references_per_prompt]
    return json.dumps([objective, *others, *numerics, *samples])


def _one_pool(made: Sequence[Variant]) -> None:
    if len({variant.experiment.training_data.uses_data_set for variant in made}) > 1:
        raise ConfigError(
            "training_data.mode offline or mixed and modes that train on samples alone use different "
            "completions",
            remedy="compare them with each other only within one of the two",
        )
