"""Every setting that study.py's entry `objectives` tried, on the validation prompts: gains and KL.

    python benchmarks/study/real_model/tried.py FOLDER --output benchmarks/results/study/real_model_tried.json

reads the store of study.py's FOLDER and computes nothing. One training of each setting, so this shows a
frontier (reward against KL), and proves no difference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from _result import about, options, publish  # noqa: E402

from qrpo_core.config import StoreConfig  # noqa: E402
from qrpo_core.evaluation.results import EvaluationResult  # noqa: E402
from qrpo_core.pipeline.run_ledger import RunLedger, StoredRun  # noqa: E402


def row(run: StoredRun, result: EvaluationResult) -> dict[str, Any]:
    """The settings that vary, and the outcome. Errors are standard errors, intervals of 95 %."""
    gains = {"reward": result.difference} | {name: each.difference for name, each in result.judges.items()}
    return {
        **{
            name: run.settings.get(f"{section}.{name}")
            for section, name in (
                ("objective", "kind"),
                ("objective", "beta"),
                ("training", "learning_rate"),
                ("training", "seed"),
            )
        },
        "prompts": result.prompts,
        "kl": result.kl.value,
        "kl_error": result.kl.standard_error,
        "gains": {name: [gain.value, gain.low, gain.high] for name, gain in gains.items()},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    found = about("every setting that the study on a real model tried, on its validation prompts")
    ledger = RunLedger(StoreConfig(path=str(given.folder / ".qrpo")))
    results = [(run, run.result) for run in ledger.runs]
    first = min(int(run.settings["training.seed"]) for run, _ in results)
    rows = [
        row(run, result)
        for run, result in results
        if result is not None and run.settings["training.seed"] == first
    ]
    found["rows"] = sorted(rows, key=lambda each: (each["kind"], each["kl"]))
    publish(found, given.output)


if __name__ == "__main__":
    main()
