"""What a training loses or gains by the sampler's log-probs as reference log-probs.

    python benchmarks/sampler_logprobs.py [--set KEY=VALUE ...] [--output FILE]
    python benchmarks/sampler_logprobs.py --tiny            # minutes: shows that it runs

The demo (experiments/demo.yaml) runs three times on the same samples: with the sampler's reference log-probs
(training_data.reference_logprobs), with the training model's, and with the training model's in another order
of the examples (training.seed 1), which shows what a difference of no meaning looks like. Given are

reference_log_probs   whose they are, and how far the sampler's are from the training model's
reward_difference     held-out mean reward after training less that before, paired, with its interval
log_ratio_rms         of up to 64 training rows after training, nats
from_policy_rms       of the difference of those log-ratios from those of the run `policy`, nats
scored_rows, seconds  of the stage `score reference log-probs`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _result import ROOT, about, options, publish

from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.evaluation import result_of
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.run_report import cost
from qrpo_core.pipeline.training import LOGPROB_COMPARISON
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.training.survival import LogprobComparison

DEMO = "experiments/demo.yaml"
#: 16 prompts, 3 completions of 8 tokens each.
TINY = [
    "prompts.size=16",
    "sampling.max_new_tokens=8",
    "sampling.references_per_prompt=3",
    "training_data={mode: random}",
    "training.batch_size=4",
]
#: A limit that nothing exceeds: the effect is to be measured, whatever the difference.
SAMPLER = ["training_data.reference_logprobs=sampler", "parity.reference_limit=1000"]
RUNS: dict[str, list[str]] = {"sampler": SAMPLER, "policy": [], "policy, another order": ["training.seed=1"]}


def run(overrides: list[str], home: Path) -> dict[str, Any]:
    """Run the demo with these overrides; the figures of its result."""
    command = [sys.executable, "-m", "flows.cli", "run", DEMO]
    for override in overrides:
        command += ["--set", override]
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    workspace = Workspace(load_experiment(ROOT / DEMO, overrides))
    steps = stored_steps(workspace)
    first, made = steps.first, steps.first.artifacts
    difference = result_of(workspace.artifacts.get(steps.after(first).evaluate)).difference
    rows = LogprobComparison.from_json(workspace.artifacts.read(made.train, LOGPROB_COMPARISON))
    data, scored = derive(workspace, made.training_set), cost(workspace, first.logprobs)
    return {
        "reference_log_probs": data.diagnostics.get("reference_logprobs", "the training model's"),
        "share_of_the_targets_deviation": [round(each.share, 5) for each in data.compared],
        "reward_difference": [difference.value, difference.low, difference.high],
        "log_ratios": np.subtract(rows.trained, rows.start),
        "scored_rows": scored["rows"],
        "seconds": round(scored["seconds"], 1),
    }


def rms(values: Any) -> float:
    return round(float(np.sqrt(np.mean(np.square(values)))), 5)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    head = about("the sampler's log-probs as reference log-probs")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        shared = [f"store.path={scratch}/store", *(TINY if given.tiny else []), *given.set]
        for name, overrides in RUNS.items():
            found[name] = run([*shared, *overrides], Path(scratch) / "prefect")
            print(name, file=sys.stderr)
    first = found["policy"]["log_ratios"]
    for each in found.values():
        ratios = each.pop("log_ratios")
        each |= {"log_ratio_rms": rms(ratios), "from_policy_rms": rms(ratios - first)}
    publish(head | {"experiment": DEMO, "overrides": given.set, "runs": found}, given.output)


if __name__ == "__main__":
    main()
