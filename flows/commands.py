"""What each command of `qrpo` does: read its options, call the library, print.

The library is imported inside the functions, so that a command loads only what it needs: none but `run` loads
Prefect, and none here loads torch. Each returns its exit status.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import yaml

from qrpo_core.config import Experiment
from qrpo_core.errors import QRPOError
from qrpo_core.experiments import load_experiment

if TYPE_CHECKING:
    from qrpo_core.steps.workspace import Workspace


def _experiment(options: argparse.Namespace) -> Experiment:
    return load_experiment(options.experiment, options.set)


def _workspace(options: argparse.Namespace) -> Workspace:
    from qrpo_core.steps.workspace import Workspace

    return Workspace(_experiment(options))


def _print(lines: Iterable[str]) -> None:
    print("\n".join(lines))


def run(options: argparse.Namespace) -> int:
    from flows.run import run

    return run(_experiment(options), options.flow)


def plan(options: argparse.Namespace) -> int:
    from flows.told import told
    from qrpo_core.plan import plan
    from qrpo_core.preflight import check
    from qrpo_core.show import plan_lines

    workspace = _workspace(options)
    check(workspace, told("checked", "prompts"))
    _print(plan_lines(plan(workspace), workspace.objects.url))
    return 0


def show(options: argparse.Namespace) -> int:
    from qrpo_core.show import result_lines

    _print(result_lines(_workspace(options)))
    return 0


def report(options: argparse.Namespace) -> int:
    from qrpo_core.show import report_path

    path = report_path(_workspace(options))
    if options.out is not None:
        shutil.copyfile(path, options.out)
        path = options.out
    print(path)
    return 0


def budget(options: argparse.Namespace) -> int:
    from qrpo_core.budget import propose
    from qrpo_core.steps import budgets
    from qrpo_core.steps.chain import budget_recipes

    workspace = _workspace(options)
    recipes = budget_recipes(workspace)
    if options.clear:
        budgets.clear(workspace.objects, *recipes)
        print("No budget: every prompt has sampling.references_per_prompt. Rows that are there stay.")
        return 0
    found = propose(workspace, add=options.add, precision=options.precision, most=options.most)
    _print(found.lines)
    if options.apply:
        budgets.write(workspace.objects, *recipes, found.references)
        print(f"Applied: the next run draws {found.rows:,} further references (qrpo plan shows them).")
    elif found.rows:
        print("Not applied; with --apply the next run follows it.")
    return 0


def config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
    elif options.experiment is None:
        raise QRPOError("qrpo config needs an experiment file or --schema")
    else:
        print(
            yaml.safe_dump(_experiment(options).model_dump(mode="json"), sort_keys=False, width=100), end=""
        )
    return 0


def explain(options: argparse.Namespace) -> int:
    from qrpo_core.explain import explain, explain_lines

    found = explain(_workspace(options), options.prompt)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(explain_lines(found))
    return 0


def ls(options: argparse.Namespace) -> int:
    from qrpo_core.inventory.listing import listing, listing_lines

    _print(listing_lines(listing(_workspace(options), options.all)))
    return 0


def verify(options: argparse.Namespace) -> int:
    from qrpo_core.inventory.check import verified_lines, verify
    from qrpo_core.inventory.text import size

    workspace = _workspace(options)
    last = time.monotonic()

    def progress(objects: int, amount: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            print(f"qrpo: verified {objects:,} objects, {size(amount)}", file=sys.stderr)

    found = verify(workspace, everything=options.all, repair=options.repair, progress=progress)
    _print(verified_lines(found, workspace.objects.url))
    return 1 if found.damaged else 0


def gc(options: argparse.Namespace) -> int:
    from qrpo_core.inventory.garbage import delete, garbage, garbage_lines, left_lines
    from qrpo_core.steps.workspace import Workspace

    days = options.older_than
    if not 0 <= days <= 36500:
        raise QRPOError(f"--older-than {days:g} is no number of days", remedy="0 or more")
    workspaces = [Workspace(load_experiment(path, options.set)) for path in options.experiment]
    objects = workspaces[0].objects
    found = garbage(workspaces, datetime.now(UTC) - timedelta(days=days))
    _print(garbage_lines(found, objects.url, days=days))
    if options.apply and found:
        _print(left_lines(found, delete(objects, found)))
    elif found:
        print("Nothing was deleted; --apply does.")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from qrpo_core.doctor import doctor_lines, examine

    found = examine()
    _print(doctor_lines(found))
    return 0 if all(each.ok for each in found if each.needed) else 1


def compact(options: argparse.Namespace) -> int:
    from qrpo_core.inventory.compaction import compact, compaction_lines

    workspace = _workspace(options)
    _print(compaction_lines(list(compact(workspace)), workspace.objects.url))
    return 0
