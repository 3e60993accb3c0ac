"""The `qrpo` command: its verbs and options. `commands.py` has what each verb does.

Exit status: 0 success; 1 an unexpected error, damage found by `verify`, or a requirement of every run missing
in `doctor`; 2 bad input (one line with value, place and remedy; nothing was written); 3 stopped at the cap of
GPU hours; 130 interrupted (committed results stay after both).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.cli import commands, data_commands
from flows.cli.service_options import (
    add_choice_options,
    add_preset_options,
    add_schedule_options,
    add_submit_options,
)
from qrpo_core.common.errors import CapError, QRPOError
from qrpo_core.common.schemas import STATUSES
from qrpo_core.inspection.known_rates import KNOWN
from tasks.interrupts import is_interrupt

FLOWS = ("align", "precompute", "train", "evaluate", "top_up")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qrpo` command."""
    options = _parser().parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except QRPOError as error:
        print(f"qrpo: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, CapError) else 2)
    except BrokenPipeError:  # `qrpo plan | head`
        sys.stderr.close()
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if not is_interrupt(error):
            raise
        print("qrpo: interrupted; committed results stay, run again to continue", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qrpo", description="Align a language model with absolute rewards.")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = _command(
        verbs, "run", commands.run, "compute missing results, train, evaluate and write the report"
    )
    run.add_argument(
        "--flow", choices=FLOWS, default="align", help="the flow to run (default: align, all stages)"
    )
    run.add_argument(
        "--pool",
        metavar="POOL",
        help="work pool (or ray) whose workers compute the missing rows; every flow but top_up",
    )
    run.add_argument(
        "--max-gpu-hours",
        type=float,
        metavar="H",
        help="stop after the block or optimiser step in which H GPU hours are spent; the next run goes on",
    )
    _add_compare(verbs)
    _add_service(verbs)
    _add_plan(verbs)
    _add_results(verbs)
    config = _command(
        verbs, "config", commands.config, "print the experiment with every default, as YAML", optional=True
    )
    config.add_argument("--schema", action="store_true", help="print the JSON schema of experiments instead")
    explain = _command(
        verbs, "explain", commands.explain, "show how the numbers of a prompt or a completion were derived"
    )
    explain.add_argument(
        "prompt",
        metavar="PROMPT[:INDEX]",
        help="prompt_id or a prefix of it; INDEX: sample_index of a completion",
    )
    explain.add_argument("--json", action="store_true", help="print JSON")
    pool = _command(
        verbs, "pool", commands.pool, "report on references and rewards before training, with other judges"
    )
    pool.add_argument("--out", type=Path, help="copy the page to this file")
    pool.add_argument("--json", action="store_true", help="print JSON")
    _add_budget(verbs)
    _add_data(verbs)
    _add_upkeep(verbs)
    about = "check which requirements of a run this machine meets, with a remedy for each that it lacks"
    doctor = verbs.add_parser("doctor", help=about, description=about[0].upper() + about[1:] + ".")
    doctor.set_defaults(command=commands.doctor)
    return parser


def _add_results(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that find and show results."""
    _command(
        verbs,
        "runs",
        commands.runs,
        "list the runs in the store: date, experiment, settings that differ, reward, judges, KL, files",
        optional=True,
    )
    _command(
        verbs,
        "show",
        commands.show,
        "print the result: the evaluation's table and the places of policy and report",
    )
    report = _command(
        verbs, "report", commands.report, "print the path of the HTML report, or copy the report"
    )
    report.add_argument("--out", type=Path, help="copy the report to this file")
    about = "print two runs beside each other: settings that differ, results, which policy is ahead"
    diff = verbs.add_parser("diff", help=about, description=about[0].upper() + about[1:] + ".")
    for name in ("first", "second"):
        diff.add_argument(name, metavar="RUN", help="number of a run, or the beginning of its digest")
    _add_store(diff)
    diff.set_defaults(command=commands.diff)


def _add_plan(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = _command(
        verbs,
        "plan",
        commands.plan,
        "print what `run` would compute in each stage, why, for how long and at which price",
    )
    plan.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of a GPU of the machine that will run it, in GiB (default: of the visible GPUs); "
        "a stage that cannot fit is refused",
    )
    plan.add_argument(
        "--device",
        choices=tuple(KNOWN),
        help="device that will run it, for the expected times of what was not measured (default: this one)",
    )
    plan.add_argument("--price", type=float, metavar="P", help="price of one GPU for an hour")
    plan.add_argument(
        "--probe",
        action="store_true",
        help="first measure on this machine, for about a minute beside loading; the store keeps the rates",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_compare(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = _command(
        verbs, "compare", commands.compare, "train variants on one pool, evaluate and compare their policies"
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="a.b=V,V",
        help="values of a setting (repeatable: every combination)",
    )
    compare.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'a.b=V,V c.d=V'",
        help="settings that belong together, a grid of its own (repeatable)",
    )
    compare.add_argument("--seeds", type=int, metavar="N", help="trainings of every variant (default 3)")
    compare.add_argument(
        "--pool", metavar="POOL", help="work pool whose workers compute rows before training"
    )
    compare.add_argument("--plan", action="store_true", help="print what it would train; train nothing")
    add_choice_options(compare)


def _add_service(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that send work to the workers of a service."""
    submit = _command(
        verbs,
        "submit",
        commands.submit,
        "run a deployment on the configured server, with the experiment's files",
    )
    add_submit_options(submit)
    schedule = _command(
        verbs,
        "schedule",
        commands.schedule,
        "show the schedules of an experiment (without one: all), or make, pause, resume or remove one",
        optional=True,
    )
    add_schedule_options(schedule)
    preset = _command(
        verbs,
        "preset",
        data_commands.preset,
        "list the presets of a store, or save or remove one",
        optional=True,
    )
    add_preset_options(preset)


def _add_budget(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    budget = _command(
        verbs, "budget", commands.budget, "propose further references: for which prompts, and what they gain"
    )
    aim = budget.add_mutually_exclusive_group()
    aim.add_argument("--add", type=int, metavar="N", help="distribute N further references")
    aim.add_argument(
        "--precision", type=float, metavar="SE", help="bring every quantile to at most this standard error"
    )
    aim.add_argument("--clear", action="store_true", help="delete the budget; stored rows stay")
    budget.add_argument("--most", type=int, metavar="N", help="largest number of references of a prompt")
    budget.add_argument("--apply", action="store_true", help="save the budget for the next run")


def _add_data(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that read the completions of a store."""
    browse = _command(verbs, "browse", data_commands.browse, "read and search completions with their rewards")
    browse.add_argument("--source", metavar="NAME", help="such as references or 'held-out, after'")
    browse.add_argument("--status", choices=(*STATUSES, "unscored"), help="status of the reward")
    browse.add_argument("--reward", metavar="MIN:MAX", help="rewards from MIN to MAX; either may be left out")
    browse.add_argument("--quantile", metavar="MIN:MAX", help="quantile rewards from MIN to MAX")
    browse.add_argument("--search", metavar="TEXT", help="text of the completion or of its conversation")
    browse.add_argument(
        "--order",
        choices=("stored", "lowest", "highest", "longest"),
        default="stored",
        help="as stored (default), by reward, or by tokens",
    )
    browse.add_argument("--limit", type=int, default=20, metavar="N", help="completions shown (default 20)")
    browse.add_argument("--full", action="store_true", help="print whole conversations and completions")
    browse.add_argument("--json", action="store_true", help="print one JSON object a line")
    export = _command(
        verbs,
        "export",
        data_commands.export,
        "write training set, completions and rewards as a data set in Parquet",
    )
    export.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="a new directory")
    push = _command(
        verbs,
        "push",
        data_commands.push,
        "upload the policy to a hub with its card, or write it to a directory",
    )
    place = push.add_mutually_exclusive_group(required=True)
    place.add_argument("--repo", metavar="OWNER/NAME", help="upload to this repository, private if it is new")
    place.add_argument(
        "--to", type=Path, metavar="DIRECTORY", help="write to a new directory; upload nothing"
    )
    push.add_argument(
        "--license", required=True, metavar="ID", help="licence of the base model, as apache-2.0"
    )
    push.add_argument(
        "--base-model", metavar="OWNER/NAME", help="hub id of the base model (default: model.path), or none"
    )
    push.add_argument("--public", action="store_true", help="make a new repository public")


def _add_upkeep(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that maintain a store."""
    ls = _command(
        verbs, "ls", commands.ls, "list the contents of the store, marked where the experiment uses them"
    )
    ls.add_argument("--all", action="store_true", help="list every recipe, not only the experiment's")
    verify = _command(
        verbs, "verify", commands.verify, "compare the stored files of the experiment with their digests"
    )
    verify.add_argument("--all", action="store_true", help="check every file of the store")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="quarantine damaged files, so that the next run makes them again",
    )
    gc = _command(
        verbs,
        "gc",
        commands.gc,
        "list what none of the named experiments uses; delete it with --apply",
        many=True,
    )
    gc.add_argument("--apply", action="store_true", help="delete instead of listing only")
    gc.add_argument(
        "--older-than",
        type=float,
        default=7.0,
        metavar="DAYS",
        help="keep what was written in the last DAYS days (default 7), which a run in progress may need",
    )
    gc.add_argument(
        "--delete-run",
        action="append",
        default=[],
        metavar="RUN",
        help="delete this run's policy, evaluation and reports as well (repeatable); other runs keep theirs",
    )
    _command(
        verbs,
        "compact",
        commands.compact,
        "merge small blocks of the experiment into few large ones",
    )


def _command(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    call: Callable[[argparse.Namespace], int],
    about: str,
    *,
    optional: bool = False,
    many: bool = False,
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    number = "?" if optional else "+" if many else None
    parser.add_argument(
        "experiment", nargs=number, help="YAML file of the experiment, or a run or preset in the store"
    )
    _add_store(parser)
    parser.set_defaults(command=call)
    return parser


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=VALUE",
        help="override a configuration field (repeatable)",
    )
    parser.add_argument(
        "--store", metavar="PATH", help="the store (default: the experiment's; of runs, presets: .qrpo)"
    )
