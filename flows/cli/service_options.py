"""The options of `qrpo submit`, `schedule` and `preset`, and those of `qrpo compare` that choose."""

from __future__ import annotations

import argparse

from flows.service.submissions import DEPLOYMENTS


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qrpo submit` but the experiment and `--set`."""
    parser.add_argument(
        "--flow", choices=DEPLOYMENTS, default="align", help="the deployment to run (default: align)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="print the run's log until it ends; Ctrl-C leaves it running"
    )
    compare = parser.add_argument_group("with --flow compare")
    compare.add_argument("--vary", action="append", default=[], metavar="a.b=V,V", help="see qrpo compare")
    compare.add_argument("--variant", action="append", default=[], metavar="'a.b=V,V'", help="the same")
    compare.add_argument("--seeds", type=int, metavar="N", help="the same")


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qrpo schedule` but the experiment and `--set`."""
    parser.add_argument(
        "--flow",
        choices=[name for name in DEPLOYMENTS if name != "compare"],
        default="top-up",
        help="the deployment that the schedule runs (default: top-up)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--cron", metavar="'M H D M W'", help="make the schedule, or change it: minute hour day month weekday"
    )
    what.add_argument("--pause", action="store_true", help="start no further run")
    what.add_argument("--resume", action="store_true", help="start runs again")
    what.add_argument("--remove", action="store_true", help="remove the schedule")
    parser.add_argument(
        "--timezone", metavar="ZONE", default="UTC", help="time zone of --cron, such as Europe/Zurich"
    )


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qrpo preset` but the experiment and `--set`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--save", action="store_true", help="save the experiment under its name, with its files, in its store"
    )
    what.add_argument("--remove", action="store_true", help="remove the preset of this name")


def add_choice_options(compare: argparse.ArgumentParser) -> None:
    """Add the options of `qrpo compare` that choose settings."""
    choice = compare.add_argument_group("choosing settings on validation prompts")
    choice.add_argument(
        "--choose-on",
        choices=("nothing", "validation"),
        help="validation: compare only the best variant of each group, on the other held-out prompts",
    )
    choice.add_argument("--choose-by", metavar="NAME", help="reward (default) or a judge")
    choice.add_argument(
        "--choose-within",
        action="append",
        metavar="a.b",
        help="variants that share these settings are a group (default objective.kind; repeatable)",
    )
    choice.add_argument("--choose-seeds", type=int, metavar="N", help="trainings to choose by (default 1)")
    choice.add_argument(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="share of the prompts that choose (default 0.5)",
    )
