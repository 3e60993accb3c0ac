"""Writing and reading blocks beside plain pyarrow, on the same disk and on the same S3 server.

    python benchmarks/store_throughput.py [--blocks 24] [--repeats 5] [--output benchmarks/results/NAME.json]

A block is 8192 completions of 60 tokens. Goal: at least 0.8 of the rate of plain pyarrow. Plain writing is
`pq.write_table` (zstd) of a file each; plain reading is the faster of one `pq.read_table` of the folder and
one of each file. Ours is `BlockStore.commit` and `BlockStore.read` of everything, by a reader that knows
nothing yet: plans, digests, manifests and listings included, and on disk the fsync of each file and folder,
which plain writing does without; it is given with fsync as well; our time in fsync and sha256 is measured.
Both use a connection that is open already, and take turns; a ratio is the median over the repeats.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from _result import about, publish
from _s3_server import ACCESS, BUCKET, SECRET, s3_server

from qrpo_core.common.hashing import digest_json
from qrpo_core.common.schemas import COMPLETIONS
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends import local
from qrpo_core.store.backends.interface import Objects
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks import block_store, reading
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.planning import BlockPlan, Wanted
from qrpo_core.store.recipe import Recipe

ROWS, TOKENS, SAMPLES = 8192, 60, 16
RECIPE = Recipe("sample", 1, {"temperature": 1.0}, {"policy": "synthetic"})

Make = tuple[BlockPlan, pa.Table]


def make_blocks(count: int) -> tuple[Wanted, list[Make]]:
    """Completions whose tokens follow a Zipf law, as text does, and whose text has a word for each."""
    rng = np.random.default_rng(0)
    wanted = {digest_json(number): range(SAMPLES) for number in range(count * ROWS // SAMPLES)}
    scratch = BlockStore(open_objects(StoreConfig(path="/nonexistent")))
    made = []
    for plan in scratch.plan(RECIPE, wanted, ROWS):
        keys, indices = zip(*plan.row_ids(), strict=True)
        tokens = np.minimum(rng.zipf(1.3, (ROWS, TOKENS)), 49_151).astype(np.int32)
        columns = {
            "prompt_id": pa.array(keys),
            "sample_index": pa.array(indices, pa.int32()),
            "seed": pa.array(rng.integers(0, 2**63, ROWS), pa.uint64()),
            "token_ids": pa.array(list(tokens), pa.list_(pa.int32())),
            "text": pa.array([" ".join(f"w{token:x}" for token in row) for row in tokens.tolist()]),
            "finish_reason": pa.array(["stop"] * ROWS),
            "num_tokens": pa.array([TOKENS] * ROWS, pa.int32()),
            "logprob": pa.array(rng.normal(-80, 10, ROWS)),
            "engine": pa.array(["transformers"] * ROWS),
        }
        made.append((plan, pa.table(columns).cast(COMPLETIONS)))
    return wanted, made


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def plain_write(fs: pafs.FileSystem, folder: str, made: list[Make], sync: bool = False) -> None:
    fs.create_dir(folder)
    for number, (_, table) in enumerate(made):
        path = f"{folder}/{number:04}.parquet"
        pq.write_table(table, path, filesystem=fs, compression="zstd")
        if sync:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def plain_read(fs: pafs.FileSystem, folder: str, made: list[Make]) -> float:
    """Seconds of the faster way."""
    paths = [f"{folder}/{number:04}.parquet" for number in range(len(made))]
    whole, table = timed(lambda: pq.read_table(folder, filesystem=fs))
    each, again = timed(lambda: pa.concat_tables([pq.read_table(path, filesystem=fs) for path in paths]))
    assert len(table) == len(again) == ROWS * len(made)
    return min(whole, each)


def our_write(objects: Objects, made: list[Make]) -> None:
    ours = BlockStore(objects)
    for plan, table in made:
        ours.commit(BlockPlan(RECIPE, plan.ranges), table, COMPLETIONS, 300.0, exact=True)


def our_read(objects: Objects, wanted: Wanted) -> pa.Table:
    return BlockStore(objects).read(RECIPE, wanted, COMPLETIONS)


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of fsync and sha256. Those of threads that wait for each other count twice."""

    def watch(module: Any, name: str, label: str) -> Callable[[], None]:
        real = getattr(module, name)

        def watching(*arguments: Any) -> Any:
            seconds, result = timed(lambda: real(*arguments))
            spent[label] = spent.get(label, 0.0) + seconds
            return result

        setattr(module, name, watching)
        return lambda: setattr(module, name, real)

    undo = [
        watch(local.os, "fsync", "fsync"),
        watch(block_store, "digest_bytes", "sha256"),
        watch(reading, "digest_bytes", "sha256"),
    ]
    try:
        yield
    finally:
        for each in undo:
            each()


def one(
    fs: pafs.FileSystem, top: str, store: StoreConfig, wanted: Wanted, made: list[Make]
) -> dict[str, Any]:
    """Seconds of one turn of each, fresh folders."""
    seconds: dict[str, Any] = {}
    objects = open_objects(store)
    objects.exists("connected")
    on_disk = isinstance(fs, pafs.LocalFileSystem)
    seconds["plain_write"], _ = timed(lambda: plain_write(fs, f"{top}/plain", made))
    if on_disk:
        seconds["plain_write_synced"], _ = timed(lambda: plain_write(fs, f"{top}/synced", made, sync=True))
    writing: dict[str, float] = {}
    with watched(writing):
        seconds["our_write"], _ = timed(lambda: our_write(objects, made))
    seconds["plain_read"] = plain_read(fs, f"{top}/plain", made)
    read_seconds: dict[str, float] = {}
    with watched(read_seconds):
        seconds["our_read"], table = timed(lambda: our_read(objects, wanted))
    assert table.slice(0, ROWS).equals(made[0][1])
    seconds["shares"] = {
        "write": {name: round(value / seconds["our_write"], 3) for name, value in writing.items()},
        "read": {name: round(value / seconds["our_read"], 3) for name, value in read_seconds.items()},
    }
    return seconds


def summary(turns: list[dict[str, Any]], made: list[Make]) -> dict[str, Any]:
    """Medians: rows a second of each, and the ratios of ours to plain."""
    rows = ROWS * len(made)
    names = [name for name in turns[0] if name != "shares"]
    result: dict[str, Any] = {
        f"{name}_rows_per_second": round(rows / statistics.median(turn[name] for turn in turns))
        for name in names
    }
    pairs = [("write", "plain_write"), ("read", "plain_read")]
    if "plain_write_synced" in turns[0]:
        pairs.append(("write", "plain_write_synced"))
    for verb, plain in pairs:
        ratios = [turn[plain] / turn[f"our_{verb}"] for turn in turns]
        result[f"our_{verb}_to_{plain}"] = round(statistics.median(ratios), 3)
        result[f"our_{verb}_to_{plain}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    result["shares_of_our_time_last_turn"] = turns[-1]["shares"]
    return result


def run(count: int, repeats: int) -> dict[str, Any]:
    wanted, made = make_blocks(count)
    result: dict[str, Any] = {"block_rows": ROWS, "blocks": count, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch, s3_server(Path(scratch) / "s3") as url:
        plain_s3 = pafs.S3FileSystem(
            access_key=ACCESS, secret_key=SECRET, endpoint_override=url, region="us-east-1"
        )
        turns: dict[str, list[dict[str, Any]]] = {"local": [], "s3": []}
        for turn in range(repeats):
            top = f"{scratch}/{turn}"
            at = StoreConfig(path=f"{top}/store")
            turns["local"].append(one(pafs.LocalFileSystem(), top, at, wanted, made))
            files = list((Path(top) / "plain").iterdir())
            result["block_megabytes"] = round(statistics.mean(f.stat().st_size for f in files) / 1e6, 2)
            shutil.rmtree(top)
            at = StoreConfig(path=f"s3://{BUCKET}/{turn}/store", endpoint_url=url, path_style=True)
            turns["s3"].append(one(plain_s3, f"{BUCKET}/{turn}", at, wanted, made))
        result |= {name: summary(each, made) for name, each in turns.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="kept with the result, such as what else was running")
    arguments = parser.parse_args()
    head = about(
        "BlockStore.commit and BlockStore.read beside plain pyarrow: blocks of 8192 rows",
        goal={"our_rate_to_plain": 0.8},
        note=arguments.note,
        versions={"pyarrow": pa.__version__},
    )
    publish(head | run(arguments.blocks, arguments.repeats), arguments.output)


if __name__ == "__main__":
    main()
