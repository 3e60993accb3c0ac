"""What Prefect costs where there are many blocks: 2,000 missing blocks, with an engine that takes no time.

    python benchmarks/orchestration.py [--blocks 2000] [--output benchmarks/results/orchestration.json]

The stage `sample references` of the demo with the fake engine and blocks of four rows, as every flow runs it
(`tasks.row_stages.row_stage`), in a flow on its own server, into a fresh store; and the same blocks without
Prefect. `--blocks` is about how many: each training prompt is one, and a hash decides which are for training.
Goals: the flow takes at most 60 s more, and 30 s after it the server has recorded how every task ended.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

from flows.service.server import PrefectServer, prefect_server, quiet_console
from qrpo_core.config import Experiment
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.experiment_steps import reference_steps
from qrpo_core.pipeline.workspace import Workspace

_ROWS = 4


def experiment(store: Path, blocks: int) -> Experiment:
    """As many training prompts as there are to be blocks, with a block's rows each."""
    overrides = [
        f"store.path={store}",
        f"store.rows_per_block={_ROWS}",
        f"sampling.references_per_prompt={_ROWS}",
        "sampling.engine=fake",
        "training_data={mode: random}",
        "prompts.templates=['Number {n}']",
        f"prompts.words={{n: {[str(n) for n in range(2 * blocks)]}}}",
        f"prompts.size={2 * blocks}",
        "prompts.held_out=0.5",
    ]
    return load_experiment(ROOT / "experiments/demo.yaml", overrides)


def prepare(store: Path, blocks: int) -> Workspace:
    """A store with model and prompts, nothing drawn."""
    from qrpo_core.pipeline import policies, prompts

    workspace = Workspace(experiment(store, blocks))
    policies.convert(workspace, policies.source_of(workspace))
    prompts.build(workspace, prompts.recipe(workspace))
    return workspace


def directly(workspace: Workspace) -> float:
    """Compute and commit every block in a plain loop; seconds."""
    step, _ = reference_steps(workspace)
    started = time.perf_counter()
    for plan in workspace.blocks.plan(step.recipe, step.wanted, _ROWS):
        table, facts = step.compute(plan, lambda rows: None)
        workspace.blocks.commit(plan, table, step.schema, 0.001, **facts)
    return time.perf_counter() - started


def with_prefect(workspace: Workspace) -> tuple[int, float, float | None]:
    """The stage in a flow; task runs, seconds, and how long after it the server's record was complete."""
    from prefect import flow

    from tasks.row_stages import row_stage

    @flow(name="orchestration")
    def stage() -> int:
        done, _ = row_stage(workspace, reference_steps(workspace)[0])
        return done.computed

    with prefect_server(PrefectServer().start(), flush_seconds=0) as server:
        started = time.perf_counter()
        rows = stage()
        seconds = time.perf_counter() - started
        blocks = rows // _ROWS
        while (lag := time.perf_counter() - started - seconds) < 120:
            if recorded(server.url) >= blocks:
                return blocks, seconds, lag
            time.sleep(0.5)
    return blocks, seconds, None


def recorded(url: str) -> int:
    """Task runs that the server knows to have ended."""
    import httpx

    wanted = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    return int(httpx.post(f"{url}/task_runs/count", json=wanted, timeout=60).json())


def measure(blocks: int) -> dict[str, Any]:
    """Both ways, each into a store of its own."""
    with tempfile.TemporaryDirectory(prefix="qrpo-orchestration-") as scratch:
        os.environ["PREFECT_HOME"] = str(Path(scratch) / "prefect")
        plain = directly(prepare(Path(scratch) / "plain", blocks))
        workspace = prepare(Path(scratch) / "flow", blocks)
        quiet_console()
        count, seconds, lag = with_prefect(workspace)
    return {
        "blocks": count,
        "flow_seconds": round(seconds, 1),
        "without_prefect_seconds": round(plain, 1),
        "orchestration_seconds": round(seconds - plain, 1),
        "record_complete_after_seconds": None if lag is None else round(lag, 1),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--blocks", type=int, default=2000)
    arguments = parser.parse_args()
    goals = {"orchestration_seconds": 60, "record_complete_after_seconds": 30}
    head = about("many blocks of no work", goals=goals)
    publish(head | measure(arguments.blocks), arguments.output)


if __name__ == "__main__":
    main()
