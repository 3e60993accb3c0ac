"""AlpacaEval's format and metrics: what its package reads and what it computes from stored preferences."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.benchmarks import BenchmarkConfig
from qrpo_core.pipeline.prompts import PromptTables
from qrpo_core.rewards.alpaca_eval import package
from qrpo_core.rewards.alpaca_eval.reward import baseline_output

#: The metrics that results show, of those that the package computes.
_SHOWN = ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error", "n_total")


@dataclass(frozen=True)
class Outputs:
    """A policy's completions of AlpacaEval's prompts.

    rows : in the package's format of model outputs (instruction, output, generator, dataset), in the order of
        the prompts. pairs : beside the baseline's outputs, with the stored preference.
    """

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def outputs(prompts: pa.Table, completions: pa.Table, generator: str) -> Outputs:
    """A policy's completions (EVALUATED rows) of prompts (PROMPTS rows). generator : its name."""
    drawn = {row["prompt_id"]: row for row in completions.to_pylist()}
    rows, pairs = [], []
    for index, prompt in enumerate(prompts.to_pylist()):
        row = drawn.get(prompt["prompt_id"])
        if row is None:
            continue
        truth = json.loads(prompt["ground_truth"])
        instruction = prompt["messages"][-1]["content"]
        dataset = truth.get("dataset", "") if isinstance(truth, dict) else ""
        rows.append(
            {
                "dataset": dataset,
                "instruction": instruction,
                "output": row["text"],
                "generator": generator,
            }
        )
        pairs.append(
            {
                "index": index,
                "instruction": instruction,
                "output_1": baseline_output(prompt["ground_truth"]),
                "output_2": row["text"],
                "preference": None if row["reward"] is None else row["reward"] + 1,
            }
        )
    return Outputs(rows, pairs)


def measure(config: BenchmarkConfig, sides: Mapping[str, Outputs]) -> dict[str, dict[str, float]]:
    """The package's metrics of each side, in percent."""
    judge = config.reward.alpaca_eval
    assert judge is not None
    with contextlib.closing(package.Package(judge.python)) as process:
        found = {
            side: process.ask(
                "measure",
                annotator=judge.annotator,
                rows=each.pairs,
                length_controlled=config.controls_length,
            )
            for side, each in sides.items()
        }
    return {side: {name: each[name] for name in _SHOWN if name in each} for side, each in found.items()}


def check_length_data(config: BenchmarkConfig, found: PromptTables, where: str) -> None:
    """Raise ConfigError where the length-controlled win rate is not defined for these prompts.

    Its model knows an instruction by its place in AlpacaEval's file, so every row has to be a prompt.
    """
    judge = config.reward.alpaca_eval
    assert judge is not None
    known = package.reach_length_data(judge.python, where)
    moved = sum(found.counts.get(name, 0) for name in ("merged", "unreadable_rows", "contradicting_rows"))
    if moved or len(found.prompts) > known:
        what = f"{moved} rows of the file are no prompt" if moved else f"{len(found.prompts):,} prompts"
        raise ConfigError(
            f"the length-controlled win rate is defined for AlpacaEval's {known:,} instructions in their "
            f"order: {what}",
            where=where,
            remedy="set length_controlled: false",
        )
