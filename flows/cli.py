"""`qrpo`: run, plan, show, report, config.

Exit status: 0 done; 1 something broke; 2 bad input (one line says what, where and the remedy; nothing was
written); 130 interrupted (what was committed stays).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from qrpo_core.config import Experiment
from qrpo_core.errors import QRPOError
from qrpo_core.experiments import load_experiment

FLOWS = ("align", "precompute", "train", "evaluate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qrpo` command."""
    options = _parser().parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except QRPOError as error:
        print(f"qrpo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("qrpo: interrupted; what was committed stays, run again to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `qrpo plan | head`
        sys.stderr.close()
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qrpo", description="Align a language model with absolute rewards.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = _command(commands, "run", _run, "compute what is missing, train, evaluate and write the report")
    run.add_argument("--flow", choices=FLOWS, default="align", help="which flow (default: align, all of it)")
    _command(commands, "plan", _plan, "what `run` would compute, stage by stage, and why; writes nothing")
    _command(
        commands, "show", _show, "the result: the evaluation's table, where the policy and the report are"
    )
    report = _command(commands, "report", _report, "print the path of the HTML report, or copy it")
    report.add_argument("--out", type=Path, help="copy the report to this file")
    config = _command(
        commands, "config", _config, "the experiment with every default, as YAML", optional=True
    )
    config.add_argument(
        "--schema", action="store_true", help="JSON schema of an experiment, with descriptions"
    )
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    call: object,
    about: str,
    *,
    optional: bool = False,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("experiment", nargs="?" if optional else None, help="YAML file of the experiment")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=VALUE", help="override a field (repeatable)"
    )
    parser.set_defaults(command=call)
    return parser


def _experiment(options: argparse.Namespace) -> Experiment:
    return load_experiment(options.experiment, options.set)


def _run(options: argparse.Namespace) -> int:
    from flows.run import run

    return run(_experiment(options), options.flow)


def _plan(options: argparse.Namespace) -> int:
    from qrpo_core.plan import plan
    from qrpo_core.preflight import check
    from qrpo_core.show import plan_lines
    from qrpo_core.steps.workspace import Workspace

    workspace = Workspace(_experiment(options))
    check(workspace)
    print("\n".join(plan_lines(plan(workspace), workspace.objects.url)))
    return 0


def _show(options: argparse.Namespace) -> int:
    from qrpo_core.show import result_lines
    from qrpo_core.steps.workspace import Workspace

    print("\n".join(result_lines(Workspace(_experiment(options)))))
    return 0


def _report(options: argparse.Namespace) -> int:
    from qrpo_core.show import report_path
    from qrpo_core.steps.workspace import Workspace

    path = report_path(Workspace(_experiment(options)))
    if options.out is not None:
        shutil.copyfile(path, options.out)
        path = options.out
    print(path)
    return 0


def _config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
    elif options.experiment is None:
        raise QRPOError("qrpo config needs an experiment file or --schema")
    else:
        print(
            yaml.safe_dump(_experiment(options).model_dump(mode="json"), sort_keys=False, width=100), end=""
        )
    return 0


if __name__ == "__main__":
    main()
