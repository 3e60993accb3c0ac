"""`qrpo submit` and `qrpo schedule`: runs of deployments on the configured server, now or by a schedule."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from flows.service.deploy import service_url
from flows.service.server import quiet_console
from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.common.extras import require
from qrpo_core.common.formatting import size
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.form import whole
from qrpo_core.config.reading import parse_section
from qrpo_core.pipeline.input_files import Carried, carry
from qrpo_core.store.backends.opening import open_objects


def submit(options: argparse.Namespace, experiment: Experiment) -> int:
    """Start a run, say where it is, and watch it if asked; returns the exit status."""
    from flows.service.submissions import submit, watch

    url = server_url("qrpo submit")
    comparison = _comparison(options)
    carried = carried_experiment(options, experiment)
    parameters: dict[str, Any] = {"experiment": whole(carried.experiment)}
    if comparison is not None:
        parameters["comparison"] = comparison.model_dump(mode="json")
    from tasks.run_names import named

    run = submit(url, options.flow, parameters, named(options.flow, carried.experiment, comparison))
    print(f"Submitted: {run.name}\nURL: {run.url}")
    print("\n".join(store_lines(carried)))
    if not run.workers:
        print(f"No worker of the work pool {run.pool} is online: the run waits for one (make workers).")
    if not options.watch:
        return 0
    try:
        watch(url, run.id, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"Not watched any more; the run goes on: {run.url}")
        return 130
    except QRPOError as error:
        print(f"qrpo: {error}", file=sys.stderr)
        return 1
    print(
        f"Completed; its result: {_show(options)}" if options.flow in ("align", "evaluate") else "Completed"
    )
    return 0


def _show(options: argparse.Namespace) -> str:
    """The command that shows the result of what was submitted."""
    given = [options.experiment, *(part for each in options.set for part in ("--set", each))]
    return shlex.join(["qrpo", "show", *given, *(["--store", options.store] if options.store else [])])


def server_url(command: str) -> str:
    """The API URL of the configured server; QRPOError if it does not answer."""
    quiet_console()
    require("prefect", command)
    return service_url()


def carried_experiment(options: argparse.Namespace, experiment: Experiment) -> Carried:
    """The experiment of a command line with its files in the store."""
    objects = open_objects(experiment.store)
    return carry(experiment, objects, (Path(options.experiment).absolute().parent, Path.cwd()))


def store_lines(carried: Carried) -> list[str]:
    """What a worker reads, and from where."""
    store = carried.experiment.store.path
    lines = [f"Store: {store}" + ("" if "://" in store else " (workers need this folder)")]
    travels = sorted({file for files in carried.files.values() for file in files.values()})
    lines += [f"Travels: {file} ({size(file.stat().st_size)})" for file in travels]
    lines += [f"Stays: {path} ({key}); workers need it there" for path, key in carried.local.items()]
    return lines


def _comparison(options: argparse.Namespace) -> ComparisonConfig | None:
    """The parameter `comparison` of the flow compare; None for the others."""

    asked = {"vary": options.vary, "variants": options.variant, "seeds": options.seeds}
    asked = {key: value for key, value in asked.items() if value}
    if options.flow != "compare":
        if asked:
            raise ConfigError("--vary, --variant and --seeds need --flow compare", remedy="add it")
        return None
    return parse_section(ComparisonConfig, asked, "qrpo submit --flow compare")
