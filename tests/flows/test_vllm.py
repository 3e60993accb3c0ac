"""The real vLLM in the pipeline: compared first, drawn from with LoRA unmerged, killed and gone on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.errors import EngineError
from qrpo_core.common.schemas import COMPLETIONS
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.engines.vllm import VllmEngine
from qrpo_core.inspection.result import report_path
from qrpo_core.pipeline import parity, prompts
from qrpo_core.pipeline.experiment_steps import reference_steps, stored_steps
from qrpo_core.pipeline.workspace import Workspace
from tests.vllm import shared

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    shared.skip_without_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", shared.KV_CACHE_GIB)
        yield shared.write_model(tmp_path_factory.mktemp("vllm") / "model")


def experiment(model: Path, store: Path, **sections: Any) -> Experiment:
    words = [f"item {number}" for number in range(10)]
    return parse_experiment(
        {
            "name": "vllm",
            "model": {"path": str(model), "dtype": "float32"},
            "prompts": {
                "kind": "template",
                "templates": ["Say {w}"],
                "words": {"w": words},
                "size": 10,
                "held_out": 0.4,
            },
            "sampling": {"engine": "vllm", "references_per_prompt": 3, "max_new_tokens": 8},
            "vllm": shared.CONFIG.model_dump() | {"merged": False},
            "parity": {"rows": 4},
            "reward": {"kind": "length", "max_words": 1},
            "training": {"precision": "fp32", "lora_rank": 2, "learning_rate": 1e-2},
            "evaluation": {"samples_per_prompt": 1, "resamples": 100},
            "store": {"path": str(store), "rows_per_block": 8},
            **sections,
        }
    )


def test_compared_sampled_trained_and_evaluated_with_adapters_unmerged(
    server: PrefectServer, model: Path, tmp_path: Path
) -> None:
    from flows.align import align

    wanted = experiment(model, tmp_path / "store")
    align(wanted)
    workspace = Workspace(wanted)
    steps = stored_steps(workspace)
    after = steps.after(steps.last()).after.samples
    assert after.policy.adapted
    assert after.policy.start == steps.reference
    for step in (steps.before.samples, after):
        asked = parity.parity_check(step)
        assert asked is not None
        facts = workspace.artifacts.get(asked.recipe).facts
        assert facts["engine"] == "vllm/cpu/float32"
        assert 1.0 <= facts["mean"] < 1.01
        rows = workspace.blocks.read(step.recipe, step.wanted, COMPLETIONS)
        assert set(rows["engine"].to_pylist()) == {"vllm/cpu/float32"}
        assert all(block.facts["exact"] is False for block in workspace.blocks.committed(step.recipe))
    page = report_path(workspace).read_text(encoding="utf-8")
    assert "rows would differ" in page


def test_a_killed_engine_names_its_log_and_the_next_try_goes_on(model: Path, tmp_path: Path) -> None:
    # Long, so that rows end at different times and the engine dies between two of them.
    long = {"engine": "vllm", "references_per_prompt": 3, "max_new_tokens": 200}
    workspace = Workspace(experiment(model, tmp_path / "store", sampling=long))
    prompts.build(workspace, prompts.recipe(workspace))
    step, _ = reference_steps(workspace)
    first, *others = workspace.blocks.plan(step.recipe, step.wanted, 8)
    assert others

    def commit(plan: Any, progress: Callable[[int], None] = lambda rows: None) -> None:
        table, facts = step.compute(plan, progress)
        workspace.blocks.commit(plan, table, step.schema, 1.0, **facts)

    commit(first)
    engine = step.engine()
    assert isinstance(engine, VllmEngine)
    process = engine._processes[0]
    assert process is not None
    with pytest.raises(EngineError, match=r"\[.*\.log\]"):
        commit(others[0], lambda rows: os.killpg(process.pid, signal.SIGKILL))
    left = workspace.blocks.plan(step.recipe, step.wanted, 8)
    assert sum(plan.rows for plan in left) == sum(plan.rows for plan in others)
    for plan in left:
        commit(plan)
    assert not workspace.blocks.plan(step.recipe, step.wanted, 8)
    workspace.close()
