"""`qrpo preset`: list, save and remove the presets of a store."""

from __future__ import annotations

import argparse

from flows.cli.commands import experiment_of, named_store
from flows.cli.submit import carried_experiment, store_lines
from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.pipeline.presets import Preset, presets, remove, save
from qrpo_core.reporting.text_table import table
from qrpo_core.store.backends.opening import open_objects

_HEAD = (
    "preset",
    "saved (UTC)",
    "model",
    "data",
    "references",
    "reward",
    "objective",
    "beta",
    "learning rate",
)


def preset(options: argparse.Namespace) -> int:
    """Do what the options say; without any, list the presets. Returns the exit status."""
    if options.experiment is None:
        if options.save or options.remove:
            raise ConfigError("it belongs to an experiment", where="qrpo preset", remedy="name a YAML file")
        print("\n".join(_lines(named_store(options))))
    elif options.remove:
        objects = open_objects(named_store(options))
        remove(objects, options.experiment)
        print(f"Removed: preset {options.experiment} of {objects.url}; its data files stay")
    elif options.save:
        experiment = experiment_of(options)
        carried = carried_experiment(options, experiment)
        replaces = save(open_objects(experiment.store), carried.experiment)
        print(f"{'Replaced' if replaces else 'Saved'}: preset {experiment.name}")
        print("\n".join(store_lines(carried)))
        print(f"Use it: qrpo submit {experiment.name} --store {carried.experiment.store.path}")
        print(f"In a form: based_on {experiment.name}, store.path {carried.experiment.store.path}")
    else:
        print("\n".join(_lines(experiment_of(options).store)))
    return 0


def _lines(store: StoreConfig) -> list[str]:
    lines, found = [f"Store: {open_objects(store).url}", ""], presets(store)
    if not found:
        return [*lines, "No preset. Save one: qrpo preset EXPERIMENT --save"]
    rows = [_HEAD, *(_row(each, each.experiment) for each in found if each.experiment)]
    lines += table(rows) if len(rows) > 1 else []
    return [*lines, *(f"{each.name} cannot be read: {each.problem}" for each in found if not each.experiment)]


def _row(found: Preset, experiment: Experiment) -> tuple[str, ...]:
    prompts = experiment.prompts
    data = prompts.path or prompts.name or prompts.task or prompts.kind
    return (
        found.name,
        f"{found.saved:%Y-%m-%d %H:%M}",
        experiment.model.path.rstrip("/").rpartition("/")[2],
        data.rstrip("/").rpartition("/")[2],
        f"{experiment.sampling.references_per_prompt}",
        experiment.reward.kind,
        experiment.objective.kind,
        f"{experiment.objective.beta:g}",
        f"{experiment.training.learning_rate:g}",
    )
