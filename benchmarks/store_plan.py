"""Planning at scale: 1,000,000 prompts x 16 samples of which 90 % are in the store, in blocks of 8192 rows.

    python benchmarks/store_plan.py [--output benchmarks/results/store_plan.json]

Goal: at most 60 seconds and 4 GB on two cores, on a local directory and on a real S3 server (SeaweedFS on the
same machine). The blocks are synthetic: manifests without data, since planning reads no data. How the 14.4
million rows came to be there decides how many runs of rows the manifests hold:

prompts   900,000 prompts have all 16 samples, 100,000 are new: one run a prompt
top_up    every prompt was raised to 4, 8, 12 and then 14 or 15 samples: four runs a prompt
scattered every prompt was raised by one sample at a time: each row is a run of its own (the worst case)

Each measurement is of a fresh process that lists the index, reads every manifest and packs what is missing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore
import numpy as np
from _result import about, publish
from _s3_server import BUCKET, s3_server

from qrpo_core.common.hashing import digest_json
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.manifest import make_manifest, to_json
from qrpo_core.store.blocks.planning import BlockPlan, RowRange, count_rows, pack
from qrpo_core.store.recipe import Recipe

PROMPTS, SAMPLES, ROWS_PER_BLOCK = 1_000_000, 16, 8192
PRESENT = 14_400_000
RECIPE = Recipe("sample", 1, {"temperature": 1.0}, {"policy": "synthetic"})
CASES = ("prompts", "top_up", "scattered")


def prompt_ids() -> list[str]:
    return [digest_json(number) for number in range(PROMPTS)]


def runs(case: str) -> Iterator[RowRange]:
    """The rows that are in the store, in the order in which they were drawn."""
    ids = prompt_ids()
    if case == "prompts":
        yield from (RowRange(key, 0, SAMPLES) for key in ids[: PRESENT // SAMPLES])
        return
    most = PRESENT - 14 * PROMPTS  # so many prompts have 15 samples, the others 14
    budgets = (4, 8, 12, 15) if case == "top_up" else range(1, 16)
    before = 0
    for budget in budgets:
        for place, key in enumerate(ids):
            count = min(budget, 15 if place < most else 14) - before
            if count:
                yield RowRange(key, before, count)
        before = budget


def fill(store: StoreConfig, case: str) -> dict[str, int]:
    """Write the manifests; returns how many blocks, runs and bytes."""
    objects = open_objects(store)
    counts = {"blocks": 0, "runs": 0, "manifest_bytes": 0, "rows": 0}

    def write(plan: BlockPlan) -> tuple[BlockPlan, int]:
        data = to_json(make_manifest(plan, digest_json(plan.id) * 2, 1_000_000, 300.0, {"exact": True}))
        local = objects.local(plan.manifest_key)
        if local is None:
            objects.write(plan.manifest_key, data)
        else:  # unsynced: this is not what is measured
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(data)
        return plan, len(data)

    with ThreadPoolExecutor(4) as pool:
        for plan, size in pool.map(write, pack(RECIPE, runs(case), ROWS_PER_BLOCK)):
            counts["blocks"] += 1
            counts["runs"] += len(plan.ranges)
            counts["rows"] += plan.rows
            counts["manifest_bytes"] += size
    assert counts["rows"] == PRESENT
    return counts


def measure(store: StoreConfig) -> dict[str, float]:
    """Seconds (wall and CPU) and peak resident memory of planning in this process."""
    wanted = {key: range(SAMPLES) for key in prompt_ids()}
    inputs = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    plans = BlockStore(open_objects(store), store).plan(RECIPE, wanted, ROWS_PER_BLOCK)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    missing = sum(plan.rows for plan in plans)
    assert missing == count_rows(wanted) - PRESENT, missing
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_rss_gb": round(peak / 1e6, 3),
        "inputs_rss_gb": round(inputs / 1e6, 3),
        "rows_missing": missing,
        "blocks_planned": len(plans),
    }


def run(store: StoreConfig, case: str) -> dict[str, object]:
    """One case on one back end, measured in a process of its own."""
    counts = fill(store, case)
    command = [sys.executable, __file__, "--one", store.model_dump_json()]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{case} on {store.path.partition(':')[0]}: {counts} {found}", file=sys.stderr)
    return {**counts, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="kept with the result, such as what else was running")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(StoreConfig.model_validate_json(arguments.one))))
        return
    result = about(
        "BlockStore.plan: 1M prompts x 16, 14.4M rows present in blocks of 8192 rows",
        goal={"seconds": 60.0, "peak_rss_gb": 4.0, "cores": 2},
        note=arguments.note,
        versions={"numpy": np.__version__, "botocore": botocore.__version__},
    )
    with tempfile.TemporaryDirectory() as scratch, s3_server(Path(scratch) / "s3") as url:
        for case in arguments.cases:
            local = StoreConfig(path=f"{scratch}/{case}")
            s3 = StoreConfig(path=f"s3://{BUCKET}/{case}", endpoint_url=url, path_style=True)
            result[case] = {"local": run(local, case), "s3": run(s3, case)}
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
