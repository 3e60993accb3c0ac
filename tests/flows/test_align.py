"""The whole flow on a real Prefect server: a two-layer model, with the fake engine and with the real one."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.schemas import COMPLETIONS
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.result import report_path, result_lines, results
from qrpo_core.models.source import policy_digest
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace

pytestmark = pytest.mark.slow

WORDS = [f"item {number}" for number in range(16)]


def experiment(tiny_model: Path, store: Path, **sections: dict[str, Any]) -> Experiment:
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "prompts": {
            "kind": "template",
            "templates": ["Say {w}"],
            "words": {"w": WORDS},
            "size": 16,
            "held_out": 0.4,
        },
        "sampling": {"engine": "fake", "references_per_prompt": 4, "max_new_tokens": 8},
        "reward": {
            "kind": "weighted",
            "terms": [
                {"weight": 1.0, "reward": {"kind": "length", "max_words": 1}},
                {"weight": 0.5, "reward": {"kind": "sentiment"}},
            ],
        },
        "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {
            "samples_per_prompt": 2,
            "resamples": 200,
            "judges": {"brevity": {"kind": "length", "max_words": 2}},
        },
        "store": {"path": str(store), "rows_per_block": 16},
    }
    return parse_experiment(
        {**settings, **{name: settings.get(name, {}) | new for name, new in sections.items()}}
    )


def align(wanted: Experiment) -> dict[str, Any]:
    from flows.align import align as flow

    return {stage.stage: stage for stage in flow(wanted)}


def cached_task_runs(since: datetime) -> Counter[str]:
    """Task runs since then, by name, that the server's own record calls Cached."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import TaskRunSort

    async def read() -> Counter[str]:
        async with get_client() as client:
            runs = await client.read_task_runs(limit=200, sort=TaskRunSort.EXPECTED_START_TIME_DESC)
        mine = [run for run in runs if run.expected_start_time and run.expected_start_time >= since]
        return Counter(run.name.rsplit("-", 1)[0] for run in mine if run.state_name == "Cached")

    return asyncio.run(read())


def artifact_keys() -> set[str | None]:
    """Keys of the artifacts that the UI shows."""
    from prefect.client.orchestration import get_client

    async def read() -> set[str | None]:
        async with get_client() as client:
            return {artifact.key for artifact in await client.read_artifacts(limit=200)}

    return asyncio.run(read())


def test_from_nothing_to_a_report_then_cached_then_a_larger_budget(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = experiment(tiny_model, tmp_path / "store")
    first = align(wanted)
    assert all(stage.computed and not stage.reused for stage in first.values())
    workspace = Workspace(wanted)
    made = results(workspace)
    text = "\n".join(result_lines(workspace))
    assert "Mean reward before" in text
    assert "Normalisation check (tie_aware)" in text
    assert "Judge brevity: difference, paired" in text
    judge = made.evaluate.facts["result"]["judges"]["brevity"]
    scores = [first[f"judge brevity held-out, {when}"] for when in ("before", "after")]
    assert [stage.computed for stage in scores] == [2 * judge["prompts"]] * 2
    page = report_path(workspace).read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html")
    assert "tiny" in page
    assert "Judge brevity" in page

    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = workspace.artifacts.folder(made.train, "policy")
    trained = AutoModelForCausalLM.from_pretrained(policy)
    original = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert any(
        not one.equal(two) for one, two in zip(trained.parameters(), original.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(policy).chat_template
    assert "base_model" in (policy / "README.md").read_text()

    before = datetime.now(UTC)
    again = align(wanted)
    assert all(stage.state == "Cached" and not stage.computed for stage in again.values())
    server.flush()
    assert sum(cached_task_runs(before).values()) == len(again)
    assert {"stages", "evaluation", "result"} <= artifact_keys()

    samples = stored_steps(workspace).first.row_steps[0]
    old = workspace.blocks.read(samples.recipe, samples.wanted, COMPLETIONS)
    doubled = experiment(tiny_model, tmp_path / "store", sampling={"references_per_prompt": 8})
    announced = {stage.stage: stage.missing for stage in plan(Workspace(doubled))}
    third = align(doubled)
    for stage in ("sample references", "annotate references", "score reference log-probs"):
        assert third[stage].computed == len(old) == announced[stage]
        assert third[stage].reused == len(old)
    assert third["sample held-out, before"].computed == 0
    kept = workspace.blocks.read(samples.recipe, samples.wanted, COMPLETIONS)
    assert kept.equals(old)


@pytest.mark.long
def test_the_real_engine_and_one_flow_at_a_time(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.evaluate import evaluate
    from flows.precompute import precompute
    from flows.train import train

    wanted = experiment(
        tiny_model, tmp_path / "store", sampling={"engine": "transformers"}, training={"learning_rate": 1e-2}
    )
    with pytest.raises(Exception, match="no prompts artifact yet"):
        train(wanted)
    assert precompute(wanted)[0].stage == "prepare prompts"
    assert [stage.computed for stage in train(wanted)] == [1]
    stages = {stage.stage: stage for stage in evaluate(wanted)}
    assert stages["write report"].computed == 1
    workspace = Workspace(wanted)
    facts = results(workspace).train.facts
    assert facts["steps"] == -(-facts["rows"] // 8)
    # The log-ratio starts at 0: the stored reference log-probs are those of the model that is trained.
    log = json.loads(workspace.artifacts.read(results(workspace).train, "history.json"))
    assert abs(log[0]["log_ratio"]) < 1e-3


def test_the_store_on_s3_gives_the_same_rows(
    server: PrefectServer,
    tiny_model: Path,
    tmp_path: Path,
    s3_store: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = experiment(tiny_model, tmp_path / "store")
    there = here.model_copy(update={"store": s3_store})
    align(here)
    first = align(there)
    assert all(stage.computed for stage in first.values())
    again = align(there)
    assert all(stage.state == "Cached" and not stage.computed for stage in again.values())
    tables = []
    for wanted in (here, there):
        steps = stored_steps(Workspace(wanted))
        read = steps.workspace.blocks.read
        tables.append([read(step.recipe, step.wanted, step.schema) for step in steps.first.row_steps])
    assert all(one.equals(two) for one, two in zip(*tables, strict=True))
    assert "Difference, paired" in "\n".join(result_lines(Workspace(there)))
    assert report_path(Workspace(there)).is_file()
    monkeypatch.setenv("QRPO_CACHE", str(tmp_path / "cache"))
    assert all(stage.missing == 0 for stage in plan(Workspace(there)))
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "a plan downloads no weights"
    steps = stored_steps(Workspace(there))
    policy = policies.stored(steps.workspace, steps.workspace.artifacts.get(steps.last().train_recipe))
    assert policy.digest == policy_digest(policy.directory)
