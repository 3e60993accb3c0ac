"""What a comparison costs beside each variant's training and evaluation, and what a repetition costs.

    python benchmarks/comparison_cost.py [--tiny] [--output benchmarks/results/comparison_cost.json]

`qrpo compare` of the demo in mode pairs: three objectives with two training seeds into a fresh store, the
same again, and one objective more. `--tiny` takes a model of two layers and fewer prompts: what surrounds
a variant is nearly all there is, and `overhead_seconds` compares with what the demo's training and evaluation
took (benchmarks/results/demo.json). `own_seconds` are those that the store's manifests and blocks record of a
variant's training, its held-out rows and its evaluation: nothing of Prefect, and no look at the store, is in
them. Goal: a variant takes at most 1.1 times its own training and evaluation.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _recorded import recorded
from _result import ROOT, about, options, publish

sys.path.insert(0, str(ROOT))

from flows.service.server import PrefectServer, prefect_server, quiet_console
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.workspace import Workspace
from tests.conftest import write_tiny_model

_TINY = ["prompts.size=32", "sampling.max_new_tokens=16", "sampling.references_per_prompt=4"]
#: The tiny model writes no words, so its rewards are lengths: others would all be equal, which is refused.
_LONGER = "def score(batch):\n    return [float(len(row.completion)) for row in batch]\n"
_OBJECTIVES = "qrpo,dpo,rebel"
#: Artifacts of one variant alone.
_OWN = ("train", "evaluate", "engine_copy")


def experiment(store: Path, model: Path | None) -> Experiment:
    overrides = [f"store.path={store}", "training_data={mode: pairs}"]
    if model is not None:
        overrides += [*_TINY, f"model.path={model}", "model.dtype=float32", "training.precision=fp32"]
        overrides += [f"reward={{kind: python, python: {{function: longer:score, file: {model}/longer.py}}}}"]
    overrides += ["evaluation.judges={brevity: {kind: length, max_words: 12}}"]
    return load_experiment(ROOT / "experiments/demo.yaml", overrides)


def seconds_of(workspace: Workspace) -> Counter[str]:
    """Seconds that the store records, by step; those of variants under `own`."""
    _, seconds = recorded(workspace)
    own = sum(seconds.pop(step, 0.0) for step in _OWN)
    return seconds + Counter({"own": own})


def compare(wanted: Experiment, objectives: str) -> dict[str, Any]:
    """One comparison: wall seconds, trainings, and the seconds that its own rows and artifacts took."""
    from flows.compare import compare as flow

    workspace = Workspace(wanted)
    before = seconds_of(workspace)
    started = time.perf_counter()
    compared = flow(wanted, ComparisonConfig(vary=(f"objective.kind={objectives}",), seeds=2))
    seconds = time.perf_counter() - started
    spent = seconds_of(Workspace(wanted)) - before
    computed: Counter[str] = Counter()
    for stage in compared.stages:
        computed[stage.stage] += stage.computed
    return {
        "objectives": objectives,
        "seconds": round(seconds, 1),
        "recorded_seconds": {step: round(value, 1) for step, value in sorted(spent.items())},
        "recorded_seconds_of_all": round(sum(spent.values()), 1),
        "trainings": computed["train policy"],
        "evaluations": computed["evaluate policy"],
        "sampled_references": computed["sample references"],
    }


def measure(tiny: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qrpo-comparison-") as scratch:
        os.environ["PREFECT_HOME"] = str(Path(scratch) / "prefect")
        quiet_console()
        model = write_tiny_model(Path(scratch) / "model") if tiny else None
        if model is not None:
            (model / "longer.py").write_text(_LONGER, encoding="utf-8")
        wanted = experiment(Path(scratch) / "store", model)
        with prefect_server(PrefectServer().start()):
            runs = [compare(wanted, each) for each in (_OBJECTIVES, _OBJECTIVES, f"{_OBJECTIVES},sft")]
    first, again, more = runs
    own = more["recorded_seconds_of_all"] - more["recorded_seconds"].get("compare", 0.0)
    overhead = (more["seconds"] - own) / more["trainings"]
    return {
        "runs": runs,
        "overhead_seconds_of_a_variant": round(overhead, 1),
        "demo": _beside_the_demo(overhead),
        "one_objective_more": {
            "own_seconds": round(own, 1),
            "times_its_own": round(more["seconds"] / own, 3),
            "times_its_own_beside_a_repetition": round((more["seconds"] - again["seconds"]) / own, 3),
        },
        "first_times_what_it_recorded": round(first["seconds"] / first["recorded_seconds_of_all"], 3),
    }


def _beside_the_demo(overhead: float) -> dict[str, float]:
    """The recorded seconds of the demo's training and evaluation, and the overhead's share of them."""
    stages = json.loads((ROOT / "benchmarks/results/demo.json").read_text("utf-8"))["run"]["stages"]
    own = sum(
        float(line.rpartition("(")[2].removesuffix(" s)"))
        for line in stages
        if re.search(r"train policy|, after|evaluate policy", line)
    )
    return {"own_seconds": round(own, 1), "times_its_own": round((own + overhead) / own, 3)}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and fewer prompts")
    given = parser.parse_args()
    goals = {"times_its_own": 1.1, "trainings_of_a_repetition": 0}
    head = about("comparison of the demo's variants", goals=goals, tiny=given.tiny)
    publish(head | measure(given.tiny), given.output)


if __name__ == "__main__":
    main()
