"""`qrpo export`: what an experiment has in its store as a data set that `datasets.load_dataset` reads.

The folder has Parquet files and a README.md, the card, whose front matter names the tables for `datasets` and
for the hub. It is written beside its place and renamed, so it is whole or not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from qrpo_core.common.errors import MissingError, ObjectiveError
from qrpo_core.common.new_directory import new_directory, refuse_existing
from qrpo_core.common.schemas import MESSAGES, PAIRS, REWARDS, TRAINING_SET
from qrpo_core.config import Experiment
from qrpo_core.inspection.completion_groups import (
    benchmark_groups,
    held_out_groups,
    training_groups,
)
from qrpo_core.inspection.completion_rows import JOINED, StoredRows
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, stored_steps
from qrpo_core.pipeline.rounds import Round
from qrpo_core.pipeline.training_set import by_source
from qrpo_core.pipeline.training_targets import TrainingData, derive
from qrpo_core.pipeline.workspace import Workspace


def _column(name: str, kind: pa.DataType, about: str) -> pa.Field:
    return pa.field(name, kind, metadata={"about": about})


_TARGETS = {
    "quantile": "the quantile reward R_q",
    "transformed": "f(R_q), reward units",
    "beta": "KL strength of the row, reward units a nat",
    "log_partition": "log Z at that beta, nats",
    "target": "f(R_q) - beta log Z, reward units; -inf: to be given up",
    "log_ratio_target": "target / beta, the log pi/pi_ref at which the loss is 0, nats",
}

#: TRAINING_SET with conversation, text, and the targets of the experiment's objective (null for baselines).
TRAINED = pa.schema(
    [
        _column("round", pa.int32(), "1 for the first training"),
        *[TRAINING_SET.field(name) for name in ("prompt_id", "sample_index")],
        JOINED.field("messages"),
        JOINED.field("text"),
        *[TRAINING_SET.field(name) for name in TRAINING_SET.names[2:]],
        *[_column(name, pa.float64(), about) for name, about in _TARGETS.items()],
    ]
)

#: The pairs of dpo, simpo, rebel and sft, as TRL's trainers read them.
PREFERENCES = pa.schema(
    [
        _column("round", pa.int32(), "1 for the first training"),
        TRAINING_SET.field("prompt_id"),
        _column("prompt", MESSAGES, "the whole conversation, system turns included"),
        _column("chosen", MESSAGES, "the preferred completion, as a turn"),
        _column("rejected", MESSAGES, "the other completion, as a turn"),
        _column("chosen_index", pa.int32(), "sample_index of the preferred completion"),
        _column("rejected_index", pa.int32(), "sample_index of the other"),
        _column("reward_chosen", pa.float64(), "null where labels decide"),
        _column("reward_rejected", pa.float64(), "null where labels decide"),
    ]
)

JUDGED = pa.schema(
    [
        JOINED.field("source"),
        _column("judge", pa.string(), "name of the judge in evaluation.judges"),
        *[REWARDS.field(name) for name in REWARDS.names if name != "ground_truth_digest"],
    ]
)


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and the rows of each (table, split)."""

    folder: Path
    rows: dict[tuple[str, str], int]

    def lines(self) -> Iterator[str]:
        """What there is, and how it is read."""
        for (table, split), rows in self.rows.items():
            yield f"{table}/{split}.parquet: {rows:,} rows"
        yield ""
        yield f"Data set: {self.folder}"
        first = next(iter(self.rows))
        yield f'Load it:  datasets.load_dataset("{self.folder}", "{first[0]}", split="{first[1]}")'
        yield f"Share it: hf upload --repo-type dataset YOU/NAME {self.folder}"


def export(workspace: Workspace, out: Path) -> Exported:
    """Write the data set of everything that the store has of the experiment.

    Raises QRPOError where `out` exists, MissingError where the store has no completions yet.
    """
    refuse_existing(out, "--out")  # before what takes long
    steps = stored_steps(workspace)
    with new_directory(out, "--out") as scratch:
        rows = dict(_written(steps, scratch))
        if not rows:
            raise MissingError(
                "no completion to export yet", where=workspace.objects.url, remedy="qrpo run first"
            )
        (scratch / "README.md").write_text(_card(workspace.experiment, rows), encoding="utf-8")
    return Exported(out, rows)


def _written(steps: ExperimentSteps, folder: Path) -> Iterator[tuple[tuple[str, str], int]]:
    sets = [(round_.number, *found) for round_ in steps.planned_rounds() if (found := _data(round_))]
    tables: dict[tuple[str, str], tuple[pa.Schema, Iterable[pa.Table]]] = {
        ("training_set", "train"): (TRAINED, (_trained(*each) for each in sets)),
        ("preferences", "train"): (PREFERENCES, (_preferences(*each) for each in sets)),
    }
    groups = {
        "train": list(training_groups(steps)),
        "held_out": list(held_out_groups(steps)),
        "benchmarks": list(benchmark_groups(steps)),
    }
    for split, some in groups.items():
        tables["completions", split] = JOINED, chain(*(StoredRows(each).chunks() for each in some))
    judged = chain(*(StoredRows(each).judged() for each in groups["held_out"]))
    tables["judgements", "held_out"] = JUDGED, (each.select(JUDGED.names) for each in judged)
    for (table, split), (schema, parts) in tables.items():
        path = folder / table / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            rows = 0
            for part in parts:
                writer.write_table(part.cast(schema))
                rows += len(part)
        if rows:
            yield (table, split), rows
        else:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _data(round_: Round) -> tuple[TrainingData, pa.Table, pa.ChunkedArray] | None:
    """A round's training set with its targets, its conversations and its texts; None while it is missing."""
    workspace = round_.workspace
    made = workspace.artifacts.find(round_.training_set_recipe)
    if made is None:
        return None
    try:
        data = derive(workspace, made)
    except ObjectiveError:
        return None
    prompts = round_.rewards.completions.prompts
    place = pc.index_in(data.table["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    chunks: list[pa.Array] = []
    for part, step in by_source(data.table, round_.logprob_steps):
        rows = list(zip(part["prompt_id"].to_pylist(), part["sample_index"].to_pylist(), strict=True))
        chunks += step.completions.read(rows)["text"].chunks
    return data, prompts.take(place)["messages"], pa.chunked_array(chunks, pa.string())


def _trained(number: int, data: TrainingData, messages: Any, text: Any) -> pa.Table:
    table, targets = data.table, data.targets
    columns: dict[str, Any] = {name: table[name] for name in TRAINING_SET.names}
    columns |= {"round": pa.array([number] * len(table), pa.int32()), "messages": messages, "text": text}
    for name in _TARGETS:
        if targets is None:
            columns[name] = pa.nulls(len(table), pa.float64())
        else:
            values = targets.log_ratio if name == "log_ratio_target" else getattr(targets, name)
            columns[name] = pa.array(values, pa.float64())
    return pa.table([columns[name] for name in TRAINED.names], names=TRAINED.names)


def _preferences(number: int, data: TrainingData, messages: Any, text: Any) -> pa.Table:
    table, pairs = data.table, data.pairs
    keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    kept = [
        (prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(*(pairs[name].to_pylist() for name in PAIRS.names), strict=True)
        if (prompt, chosen) in row_of and (prompt, rejected) in row_of
    ]
    prompts, *sides = zip(*kept, strict=True) if kept else ((), (), ())
    columns: dict[str, Any] = {
        "round": pa.array([number] * len(kept), pa.int32()),
        "prompt_id": pa.array(prompts, pa.string()),
    }
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        rows = pa.array([row_of[key] for key in zip(prompts, side, strict=True)], pa.int64())
        turns = [[{"role": "assistant", "content": each}] for each in text.take(rows).to_pylist()]
        columns[name] = pa.array(turns, MESSAGES)
        columns[f"{name}_index"] = pa.array(side, pa.int32())
        columns[f"reward_{name}"] = table["reward"].take(rows)
        columns["prompt"] = messages.take(rows)
    return pa.table([columns[name] for name in PREFERENCES.names], names=PREFERENCES.names)


def _card(experiment: Experiment, rows: dict[tuple[str, str], int]) -> str:
    """README.md: which files are which table, and the meaning of every column."""
    schemas = {
        "training_set": TRAINED,
        "preferences": PREFERENCES,
        "completions": JOINED,
        "judgements": JUDGED,
    }
    configs: list[dict[str, Any]] = []
    for table in dict.fromkeys(table for table, _ in rows):
        files = [{"split": s, "path": f"{t}/{s}.parquet"} for t, s in rows if t == table]
        configs.append({"config_name": table, "data_files": files})
    configs[0]["default"] = True
    front = yaml.safe_dump({"configs": configs, "tags": ["qrpo"]}, sort_keys=False)
    parts = [f"---\n{front}---\n# {experiment.name}\n"]
    parts.append(
        f"Completions of `{experiment.model.path}` and policies trained from it, with rewards; objective "
        f"{experiment.objective.kind}.\n"
    )
    for config in configs:
        table = config["config_name"]
        count = ", ".join(f"{s} {n:,} rows" for (t, s), n in rows.items() if t == table)
        lines = [f"| {each.name} | {each.metadata[b'about'].decode()} |" for each in schemas[table]]
        parts.append("\n".join([f"## {table}\n", f"{count}\n", "| column | |", "|---|---|", *lines, ""]))
    return "\n".join(parts)
