"""The verbs of `qrpo`: each reads its options, calls the library, prints, and returns the exit status.

Imports stand inside the functions, so that a verb loads only what it needs: `run` alone loads Prefect, and
none loads torch by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import yaml

from qrpo_core.common.errors import QRPOError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_section

if TYPE_CHECKING:
    from qrpo_core.pipeline.run_ledger import RunLedger
    from qrpo_core.pipeline.workspace import Workspace


def experiment_of(options: argparse.Namespace) -> Experiment:
    """The experiment that the command names: a YAML file, or a run or a preset in the store."""
    return _named(options, options.experiment)


def _named(options: argparse.Namespace, name: str) -> Experiment:
    """The experiment of a YAML file, or of a run or a preset in the store."""
    from qrpo_core.pipeline.presets import named_experiment

    return named_experiment(name, options.set, options.store)


def overrides(options: argparse.Namespace) -> list[str]:
    """The values of --set, and --store as one of them."""
    return [*options.set, *([] if options.store is None else [f"store.path={json.dumps(options.store)}"])]


def _ledger_of(options: argparse.Namespace, name: str) -> RunLedger | None:
    """The ledger of the store where `name` can only be a run; else None."""
    from qrpo_core.pipeline.run_ledger import names_a_run

    return _ledger(options) if names_a_run(name) else None


def _ledger(options: argparse.Namespace) -> RunLedger:
    """The ledger of the store that --store and --set store.… name."""
    from qrpo_core.pipeline.run_ledger import RunLedger

    return RunLedger(named_store(options))


def named_store(options: argparse.Namespace) -> StoreConfig:
    """The store that --store and --set store.… name."""
    from qrpo_core.pipeline.presets import store_of

    return store_of(overrides(options))


def workspace_of(options: argparse.Namespace) -> Workspace:
    """The experiment that the command names, a YAML file or a run, with its store."""
    from qrpo_core.pipeline.workspace import Workspace

    return Workspace(experiment_of(options))


def _print(lines: Iterable[str]) -> None:
    print("\n".join(lines))


def run(options: argparse.Namespace) -> int:
    from flows.cli.run import run

    return run(experiment_of(options), options.flow, options.pool, options.max_gpu_hours)


def compare(options: argparse.Namespace) -> int:
    from flows.cli.compare import compare
    from qrpo_core.config.comparison import ComparisonConfig

    asked = {
        "vary": options.vary,
        "variants": options.variant,
        "seeds": options.seeds,
        "choose_on": options.choose_on,
        "choose_by": options.choose_by,
        "choose_within": options.choose_within,
        "choose_seeds": options.choose_seeds,
        "validation_share": options.validation_share,
    }
    config = parse_section(
        ComparisonConfig, {k: v for k, v in asked.items() if v is not None}, "qrpo compare"
    )
    return compare(experiment_of(options), config, options.pool, plan_only=options.plan)


def submit(options: argparse.Namespace) -> int:
    from flows.cli.submit import submit

    return submit(options, experiment_of(options))


def schedule(options: argparse.Namespace) -> int:
    from flows.cli.schedule import schedule

    return schedule(options, None if options.experiment is None else experiment_of(options))


def plan(options: argparse.Namespace) -> int:
    from flows.cli.plan import plan

    return plan(experiment_of(options), options)


def show(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.result import result_lines
    from qrpo_core.inspection.runs import show_lines

    if (ledger := _ledger_of(options, options.experiment)) is not None:
        _print(show_lines(ledger, ledger.find(options.experiment)))
    else:
        _print(result_lines(workspace_of(options)))
    return 0


def diff(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.run_diff import diff_lines

    ledger = _ledger(options)
    _print(diff_lines(ledger, ledger.find(options.first), ledger.find(options.second)))
    return 0


def report(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.result import report_path

    if (ledger := _ledger_of(options, options.experiment)) is not None:
        path = ledger.report_path(ledger.find(options.experiment))
    else:
        path = report_path(workspace_of(options))
    if options.out is not None:
        shutil.copyfile(path, options.out)
        path = options.out
    print(path)
    return 0


def pool(options: argparse.Namespace) -> int:
    from flows.cli.pool import pool

    return pool(experiment_of(options), options.out, options.json)


def budget(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.budget import propose
    from qrpo_core.pipeline import budgets
    from qrpo_core.pipeline.experiment_steps import budget_recipes

    workspace = workspace_of(options)
    recipes = budget_recipes(workspace)
    if options.clear:
        budgets.clear(workspace.objects, *recipes)
        print("No budget: every prompt gets sampling.references_per_prompt references. Stored rows stay.")
        return 0
    found = propose(workspace, add=options.add, precision=options.precision, most=options.most)
    _print(found.lines)
    if options.apply:
        budgets.write(workspace.objects, *recipes, found.references)
        print(f"Applied: the next run draws {found.rows:,} further references (qrpo plan shows them).")
    elif found.rows:
        print("Not applied; add --apply to save it for the next run.")
    return 0


def config(options: argparse.Namespace) -> int:
    if options.schema:
        print(json.dumps(Experiment.model_json_schema(), indent=2))
    elif options.experiment is None:
        raise QRPOError("qrpo config needs an experiment file or --schema")
    else:
        print(
            yaml.safe_dump(experiment_of(options).model_dump(mode="json"), sort_keys=False, width=100), end=""
        )
    return 0


def explain(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.explain import explain, explain_lines

    found = explain(workspace_of(options), options.prompt)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(explain_lines(found))
    return 0


def ls(options: argparse.Namespace) -> int:
    from qrpo_core.maintenance.listing import listing, listing_lines

    _print(listing_lines(listing(workspace_of(options), options.all)))
    return 0


def runs(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.runs import run_lines
    from qrpo_core.pipeline.run_ledger import RunLedger

    named = options.experiment is not None
    _print(run_lines(RunLedger(experiment_of(options).store) if named else _ledger(options)))
    return 0


def verify(options: argparse.Namespace) -> int:
    from flows.cli.progress_line import every_few_seconds
    from qrpo_core.common.formatting import size
    from qrpo_core.maintenance.verify import verified_lines, verify

    workspace = workspace_of(options)
    write = every_few_seconds()

    def progress(objects: int, amount: int) -> None:
        write(f"verified {objects:,} objects, {size(amount)}")

    found = verify(workspace, everything=options.all, repair=options.repair, progress=progress)
    _print(verified_lines(found, workspace.objects.url))
    return 1 if found.damaged else 0


def gc(options: argparse.Namespace) -> int:
    from qrpo_core.maintenance.gc import delete, garbage, garbage_lines, left_lines
    from qrpo_core.pipeline.run_ledger import RunLedger
    from qrpo_core.pipeline.workspace import Workspace

    days = options.older_than
    if not 0 <= days <= 36500:
        raise QRPOError(f"--older-than {days:g} is not a number of days", remedy="0 or more")
    workspaces = [Workspace(_named(options, name)) for name in options.experiment]
    objects, ledger = workspaces[0].objects, RunLedger(workspaces[0].experiment.store)
    named = [ledger.find(name) for name in options.delete_run]
    found = garbage(workspaces, datetime.now(UTC) - timedelta(days=days), named)
    _print(garbage_lines(found, objects.url, days=days))
    if options.apply and found.garbage:
        _print(left_lines(found.garbage, delete(objects, found.garbage)))
    elif found.garbage:
        print("Nothing was deleted; add --apply to delete.")
    return 0


def doctor(options: argparse.Namespace) -> int:
    from qrpo_core.inspection.doctor import doctor_lines, examine

    found = examine()
    _print(doctor_lines(found))
    return 0 if all(each.ok for each in found if each.needed) else 1


def compact(options: argparse.Namespace) -> int:
    from qrpo_core.maintenance.compact import compact, compaction_lines

    workspace = workspace_of(options)
    _print(compaction_lines(list(compact(workspace)), workspace.objects.url))
    return 0
