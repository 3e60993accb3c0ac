"""The lab: which normaliser, beta, n and objective, in worlds where everything is known exactly.

    nice -n 10 env OMP_NUM_THREADS=1 python benchmarks/study/lab.py [ENTRY ...]

Without ENTRY every entry runs. Results stand in benchmarks/results/study/lab_ENTRY.json, one cell a line,
written after each cell: a run that was stopped goes on where it was, and a cell that any entry's file holds
is not computed again. Each cell is one training of 20 seeds: other worlds, other draws, the same for every
variant, so that differences are paired. _lab_world.py says what a world is.

    python benchmarks/study/lab.py --quick --results FOLDER    two seeds, few prompts; for a test
    python benchmarks/study/lab.py --epochs 20 bounds longer   the same worlds, trained longer
    python benchmarks/study/lab.py --first-seed 20 bounds confirm   20 other worlds, unseen by the choice
    python benchmarks/study/lab.py --tables                    docs/concepts/lab.md's tables from the files
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from _lab_entries import ENTRIES  # noqa: E402
from _lab_policy import BATCH, EPOCHS, Schedule  # noqa: E402
from _lab_targets import Cell  # noqa: E402
from _lab_training import run_cell  # noqa: E402
from _result import ROOT, commit, hardware  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "study"
SEEDS, PROMPTS, HELD_OUT = 20, 800, 300
VERSION = 1
"""Raised where a change of the code changes results: cells of another version are computed again."""


def size(quick: bool, epochs: int = EPOCHS, first_seed: int = 0) -> dict[str, Any]:
    """What all cells of a run share; cells computed at another size are not used."""
    if quick:
        return {"version": VERSION, "seeds": 2, "prompts": 40, "held_out": 20, "epochs": 2, "batch": 20}
    return {
        "version": VERSION,
        "seeds": SEEDS,
        "prompts": PROMPTS,
        "held_out": HELD_OUT,
        "epochs": epochs,
        "batch": BATCH,
    } | ({"first_seed": first_seed} if first_seed else {})


def key(cell: Cell) -> str:
    """The cell's settings on one line."""
    return json.dumps(cell.settings())


def read(folder: Path, shared: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """{key: measures} of the cells of every file of this size."""
    found = {}
    for path in sorted(folder.glob("lab_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["size"] == shared:
            found |= {json.dumps(each["settings"]): each["measures"] for each in content["cells"]}
    return found


def write(path: Path, head: dict[str, Any], cells: dict[str, dict[str, list[float]]]) -> None:
    """The file of an entry, replaced in one step; one cell a line."""
    lines = ",\n".join(
        f'{{"settings": {name}, "measures": {json.dumps(found)}}}' for name, found in cells.items()
    )
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "cells": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run_entry(name: str, folder: Path, shared: dict[str, Any]) -> int:
    """Compute the missing cells of an entry and write its file; returns how many were computed."""
    known = read(folder, shared)
    wanted = {key(cell): cell for cell in ENTRIES[name]()}
    cells = {each: known[each] for each in wanted if each in known}
    first = shared.get("first_seed", 0)
    options = "" if shared["epochs"] == EPOCHS else f" --epochs {shared['epochs']}"
    options += f" --first-seed {first}" if first else ""
    head = {
        "benchmark": f"lab: {' '.join(getattr(ENTRIES[name], 'func', ENTRIES[name]).__doc__.split())}",
        "hardware": hardware(),
        "commit": commit(),
        "command": f"python benchmarks/study/lab.py {name}{options}",
        "size": shared,
    }
    schedule = Schedule(epochs=shared["epochs"], batch=shared["batch"])
    seeds = tuple(range(first, first + shared["seeds"]))
    computed = 0
    for each, cell in wanted.items():
        if each in cells:
            continue
        start = time.perf_counter()
        cells[each] = run_cell(cell, seeds, shared["prompts"], shared["held_out"], schedule)
        computed += 1
        print(f"{name} {len(cells)}/{len(wanted)} {time.perf_counter() - start:.1f} s {each}", flush=True)
        write(folder / f"lab_{name}.json", head, {one: cells[one] for one in wanted if one in cells})
    if not (folder / f"lab_{name}.json").is_file():  # other files had every cell
        write(folder / f"lab_{name}.json", head, cells)
    return computed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", nargs="*", metavar="ENTRY", help=", ".join(ENTRIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="others go to a folder of their own")
    parser.add_argument("--first-seed", type=int, default=0, help="others go to a folder of their own")
    arguments = parser.parse_args()
    if arguments.epochs != EPOCHS and arguments.results == RESULTS:
        arguments.results = RESULTS / f"lab_{arguments.epochs}_epochs"
    elif arguments.first_seed and arguments.results == RESULTS:
        arguments.results = RESULTS / f"lab_from_seed_{arguments.first_seed}"
    unknown = [name for name in arguments.entries if name not in ENTRIES]
    if unknown:
        parser.error(f"unknown entry {', '.join(unknown)}; entries: {', '.join(ENTRIES)}")
    if arguments.tables:
        from _lab_tables import write_page

        write_page(arguments.results)
        return
    if arguments.quick and arguments.results == RESULTS:
        parser.error("--quick needs --results with a folder of its own")
    torch.set_num_threads(1)
    shared = size(arguments.quick, arguments.epochs, arguments.first_seed)
    computed = {name: run_entry(name, arguments.results, shared) for name in arguments.entries or ENTRIES}
    print(f"computed {sum(computed.values())} cells: {computed}")


if __name__ == "__main__":
    main()
