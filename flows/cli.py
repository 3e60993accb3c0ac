"""`qrpo`: run, plan, show, report, config; explain, budget; ls, verify, gc, compact; doctor.

Exit status: 0 done; 1 something broke, `verify` found damage, or `doctor` misses what every run needs; 2 bad
input (one line says what, where and the remedy; nothing was written); 130 interrupted (what was committed
stays).

What the commands do is in `commands.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows import commands
from qrpo_core.errors import QRPOError
from tasks.interrupts import interrupted

FLOWS = ("align", "precompute", "train", "evaluate", "top_up")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `qrpo` command."""
    options = _parser().parse_args(arguments)
    try:
        sys.exit(options.command(options))
    except QRPOError as error:
        print(f"qrpo: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `qrpo plan | head`
        sys.stderr.close()
        sys.exit(0)
    except (Exception, KeyboardInterrupt) as error:
        if not interrupted(error):
            raise
        print("qrpo: interrupted; what was committed stays, run again to go on", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qrpo", description="Align a language model with absolute rewards.")
    added = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = _command(
        added, "run", commands.run, "compute what is missing, train, evaluate and write the report"
    )
    run.add_argument("--flow", choices=FLOWS, default="align", help="which flow (default: align, all of it)")
    _command(
        added, "plan", commands.plan, "what `run` would compute, stage by stage, and why; writes nothing"
    )
    _command(
        added,
        "show",
        commands.show,
        "the result: the evaluation's table, where the policy and the report are",
    )
    report = _command(added, "report", commands.report, "print the path of the HTML report, or copy it")
    report.add_argument("--out", type=Path, help="copy the report to this file")
    config = _command(
        added, "config", commands.config, "the experiment with every default, as YAML", optional=True
    )
    config.add_argument(
        "--schema", action="store_true", help="JSON schema of an experiment, with descriptions"
    )
    explain = _command(
        added, "explain", commands.explain, "where the numbers of a prompt or a completion come from"
    )
    explain.add_argument(
        "prompt", metavar="PROMPT[:INDEX]", help="prompt_id or its beginning; sample_index of a completion"
    )
    explain.add_argument("--json", action="store_true", help="the same as JSON")
    _add_budget(added)
    _add_upkeep(added)
    about = "what this machine has of what a run may need, and what to do about the rest"
    doctor = added.add_parser("doctor", help=about, description=about[0].upper() + about[1:] + ".")
    doctor.set_defaults(command=commands.doctor)
    return parser


def _add_budget(added: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    budget = _command(
        added, "budget", commands.budget, "what further references would buy, and for which prompts"
    )
    aim = budget.add_mutually_exclusive_group()
    aim.add_argument("--add", type=int, metavar="N", help="share out N further references")
    aim.add_argument(
        "--precision", type=float, metavar="SE", help="give every quantile at most this standard error"
    )
    aim.add_argument("--clear", action="store_true", help="forget the budget; what it has bought stays")
    budget.add_argument("--most", type=int, metavar="N", help="references of one prompt, in all, at most")
    budget.add_argument("--apply", action="store_true", help="the next run follows it")


def _add_upkeep(added: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that look after a store."""
    ls = _command(added, "ls", commands.ls, "what the store holds, and what of it the experiment uses")
    ls.add_argument("--all", action="store_true", help="every recipe, not only the experiment's")
    verify = _command(
        added, "verify", commands.verify, "compare everything that the experiment uses with its digest"
    )
    verify.add_argument("--all", action="store_true", help="everything in the store")
    verify.add_argument("--repair", action="store_true", help="set aside what is damaged, to be made again")
    gc = _command(
        added,
        "gc",
        commands.gc,
        "what none of the experiments named refers to; deletes only with --apply",
        many=True,
    )
    gc.add_argument("--apply", action="store_true", help="delete it")
    gc.add_argument(
        "--older-than",
        type=float,
        default=7.0,
        metavar="DAYS",
        help="leave alone what was written in the last DAYS days (default 7): a run in progress may need it",
    )
    _command(
        added,
        "compact",
        commands.compact,
        "merge the many small blocks of the experiment into few large ones",
    )


def _command(
    added: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    call: Callable[[argparse.Namespace], int],
    about: str,
    *,
    optional: bool = False,
    many: bool = False,
) -> argparse.ArgumentParser:
    parser = added.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    number = "?" if optional else "+" if many else None
    parser.add_argument("experiment", nargs=number, help="YAML file of the experiment")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=VALUE", help="override a field (repeatable)"
    )
    parser.set_defaults(command=call)
    return parser


if __name__ == "__main__":
    main()
