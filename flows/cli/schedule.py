"""`qrpo schedule`: make, show, pause, resume and remove the schedules of experiments."""

from __future__ import annotations

import argparse

from flows.cli.submit import carried_experiment, server_url, store_lines
from flows.service.schedules import (
    Scheduled,
    change_schedule,
    put_schedule,
    schedules,
)
from flows.service.submissions import DEPLOYMENTS
from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment
from qrpo_core.reporting.text_table import table
from qrpo_core.store.backends.opening import open_objects

_MAKE = "Make one: qrpo schedule EXPERIMENT --cron '0 2 * * *'"
_PAST = {"pause": "Paused", "resume": "Resumed", "remove": "Removed"}


def schedule(options: argparse.Namespace, experiment: Experiment | None) -> int:
    """Do what the options say, then show the schedules; returns the exit status."""
    changes = [name for name in ("pause", "resume", "remove") if getattr(options, name)]
    if experiment is None:
        if options.cron or changes:
            raise ConfigError("a schedule belongs to an experiment", remedy="name its YAML file")
        url = server_url("qrpo schedule")
        found = schedules(url, DEPLOYMENTS)
        print("\n".join(_table(found) if found else [f"No schedule on {url}. {_MAKE}"]))
        return 0
    name, store = experiment.name, experiment.store.path
    store = store if "://" in store else open_objects(experiment.store).url
    url = server_url("qrpo schedule")
    if options.cron:
        carried = carried_experiment(options, experiment)
        page = put_schedule(url, options.flow, carried.experiment, options.cron, options.timezone)
        print(f"Scheduled: {options.flow} {name}, {options.cron} ({options.timezone})\nURL: {page}")
        print("\n".join(store_lines(carried)))
        print("It runs the experiment as it is now. After a change: the same command again.")
        return 0
    for to in changes:
        print(f"{_PAST[to]}: {change_schedule(url, options.flow, name, store, to=to, among=DEPLOYMENTS)}")
    print("\n".join(_own_lines(schedules(url, DEPLOYMENTS), name, store, url)))
    return 0


def _own_lines(found: list[Scheduled], name: str, store: str, url: str) -> list[str]:
    """The schedules of an experiment; without any, where they were looked for and what there is."""
    if own := [each for each in found if (each.experiment, each.store) == (name, store)]:
        return _table(own)
    others = f"The {len(found)} there are of other experiments or stores:" if found else _MAKE
    nothing = f"No schedule of experiment {name!r} with store {store} on {url}. {others}"
    return [nothing, *(_table(found) if found else ())]


def _table(found: list[Scheduled]) -> list[str]:
    rows = [("experiment", "flow", "cron", "time zone", "state", "store", "page")]
    for each in found:
        state = "active" if each.active else "paused"
        rows.append(
            (each.experiment or "-", each.flow, each.cron, each.timezone, state, each.store or "-", each.url)
        )
    return table(rows)
