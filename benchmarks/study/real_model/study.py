"""The study on a real model: every objective on one pool, how many references, and rewards that tie.

    pip install wonderwords textblob alt-profanity-check py3langid
    python benchmarks/study/real_model/study.py FOLDER [ENTRY ...]

Without ENTRY every entry runs, in the order of `ENTRIES`. FOLDER keeps prompts, model and store: a run that
was stopped goes on where it was, and entries share the pool. Results stand in
benchmarks/results/study/real_model_ENTRY.json: the whole comparison, what varied, what this run computed, and
what the store holds of each step with the seconds that it took, those of stopped runs with it.

objectives  seven objectives, each at the best of its settings (three betas and two learning rates) by the
            gain on validation prompts; the chosen ones with five other seeds on the test prompts
references  qrpo as `objectives` chose it, with 4, 10, 16 and 64 reference completions a prompt beside the
            pool of 6 that is trained on: the same completions, other targets. Its policies with 10 are
            those of `objectives`
ties        experiments/arithmetic.yaml (right or wrong) with ties counted and not counted
demo        four objectives at their default settings on the demo's pool, which its settings were tried on

`--tiny` takes few prompts and few tokens, to see that the script runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import prompts  # noqa: E402
from _recorded import recorded  # noqa: E402
from _result import ROOT, about, publish, versions  # noqa: E402

sys.path.insert(0, str(ROOT))

from flows.service.server import PrefectServer, prefect_server, quiet_console  # noqa: E402
from qrpo_core.config import Experiment  # noqa: E402
from qrpo_core.config.comparison import ComparisonConfig  # noqa: E402
from qrpo_core.config.reading import load_experiment  # noqa: E402
from qrpo_core.pipeline.workspace import Workspace  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "study"
_RATES = "training.learning_rate=1.5e-5,5.0e-5"


@dataclass(frozen=True)
class Entry:
    """A comparison. experiment : its file in FOLDER. comparison : what varies. overrides : of the file."""

    experiment: str
    comparison: ComparisonConfig
    overrides: tuple[str, ...] = ()


def _variants(*lines: str) -> tuple[str, ...]:
    return tuple(f"objective.kind={line} {_RATES}" for line in lines)


ENTRIES = {
    "objectives": Entry(
        "study.yaml",
        ComparisonConfig(
            variants=_variants(
                "qrpo objective.beta=0.1,0.3,1",
                "tup objective.beta=0.3,1,3",
                "a_star objective.beta=0.1,0.3,1",
                "dpo objective.beta=0.03,0.1,0.3",
                "rebel objective.beta=0.1,0.3,1",
                "simpo objective.beta=2,5,10",
                "sft",
            ),
            seeds=5,
            choose_on="validation",
            validation_share=0.22,
        ),
    ),
    "references": Entry(
        "study.yaml",
        ComparisonConfig(vary=("sampling.references_per_prompt=10,16,22,70",), seeds=5),
        ("objective.beta=0.1", "training.learning_rate=5e-5", "training.seed=1"),
    ),
    "ties": Entry(
        "arithmetic.yaml",
        ComparisonConfig(
            variants=(
                "objective.normaliser=tie_aware",
                "objective.normaliser=population objective.tie_tolerance=1",
            ),
            seeds=3,
        ),
    ),
    "demo": Entry("demo.yaml", ComparisonConfig(vary=("objective.kind=qrpo,dpo,sft,rebel",), seeds=2)),
}
_TINY = ("prompts.limit=64", "sampling.max_new_tokens=4")


def prepare(folder: Path) -> None:
    """Put model, prompts, judges and experiments into the folder, and work there."""
    prompts.write(folder)
    own = (HERE / name for name in ("study.yaml", "judges.py"))
    for path in (*own, *(ROOT / "experiments" / name for name in ("arithmetic.yaml", "demo.yaml"))):
        shutil.copy(path, folder)
    os.chdir(folder)
    sys.path.insert(0, str(folder))


def spent(experiment: Experiment) -> dict[str, dict[str, float]]:
    """By step: rows or artifacts in the store, and the seconds that their manifests record."""
    counts, seconds = recorded(Workspace(experiment))
    return {step: {"count": counts[step], "seconds": round(seconds[step], 1)} for step in sorted(counts)}


def run(name: str, entry: Entry, overrides: Sequence[str], output: Path) -> None:
    """One comparison, and its result file."""
    from flows.compare import VariantsFailed, compare
    from qrpo_core.pipeline.comparison import comparison_lines, result_of

    head = about(f"study on a real model: {name}")
    experiment = load_experiment(Path(entry.experiment), list(overrides))
    started = time.monotonic()
    try:
        compared = compare(experiment, entry.comparison)
    except VariantsFailed as error:
        compared = error.compared
    computed: Counter[str] = Counter()
    for stage in compared.stages:
        computed[stage.stage] += stage.computed
    workspace = Workspace(experiment)
    found = {
        "versions": versions(
            "textblob", "alt-profanity-check", "py3langid", "vaderSentiment", "transformers"
        ),
        "experiment": entry.experiment,
        "comparison": entry.comparison.model_dump(exclude_defaults=True, mode="json"),
        "overrides": list(overrides),
        "this_run": {
            "seconds": round(time.monotonic() - started),
            "computed": dict(sorted(computed.items())),
        },
        "store": spent(experiment),
        "printed": comparison_lines(workspace, compared.manifest)[:-1],
        "result": result_of(compared.manifest).to_dict(),
    }
    publish(head | found, output / f"real_model_{name}.json", shown="\n".join(found["printed"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("entries", nargs="*", metavar="ENTRY", default=list(ENTRIES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.entries) - set(ENTRIES):
        parser.error(f"{', '.join(sorted(unknown))}: no entry; there are {', '.join(ENTRIES)}")
    folder, results = given.folder.resolve(), given.results.resolve()
    os.environ["PREFECT_HOME"] = str(folder / "prefect")
    quiet_console()
    prepare(folder)
    with prefect_server(PrefectServer().start()):
        for name in given.entries:
            entry = ENTRIES[name]
            run(name, entry, (*entry.overrides, *(_TINY if given.tiny else ())), results)


if __name__ == "__main__":
    main()
