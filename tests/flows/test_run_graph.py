"""The run graph that Prefect's UI draws: the stages of the mission as nodes, their inputs as arrows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.service.server import PrefectServer
from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.pipeline.stage_names import (
    ANNOTATE_COMPLETIONS,
    SAMPLE_COMPLETIONS,
    SCORE_REFERENCE_LOGPROBS,
    STAGES,
)
from tests.flows.small import small

pytestmark = pytest.mark.slow

ROUND_STAGES = (SAMPLE_COMPLETIONS, ANNOTATE_COMPLETIONS)


def settings(model: Path, store: Path, **sections: Any) -> Experiment:
    wanted = small(model, store) | {
        "evaluation": {"samples_per_prompt": 2, "resamples": 100},
        "training": {"precision": "fp32", "batch_size": 8},
    }
    wanted["store"] |= {"rows_per_block": 16}
    wanted["prompts"] |= {"held_out": 0.4}
    return parse_experiment(wanted | sections)


def ask(server: PrefectServer, path: str, **body: Any) -> Any:
    """A request to the API: a POST if it has a body."""
    method = "POST" if body else "GET"
    return httpx.request(method, f"{server.url}{path}", json=body or None, timeout=60).json()


def newest(server: PrefectServer, flow: str) -> str:
    """The id of the newest run of a flow."""
    wanted: dict[str, Any] = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
    (run,) = ask(server, "/flow_runs/filter", **wanted)
    return str(run["id"])


def graph(server: PrefectServer, flow: str) -> dict[str, dict[str, Any]]:
    """Nodes of the newest run of a flow by label, with the labels of their parents; waits for the record."""

    server.flush(timeout=120)  # a graph without the last tasks may look finished
    run = newest(server, flow)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = {node["id"]: node for _, node in ask(server, f"/flow_runs/{run}/graph-v2")["nodes"]}
        if found and all(node["state_type"] == "COMPLETED" for node in found.values()):
            break
        time.sleep(0.5)
    return {
        node["label"]: {**node, "from": {found[parent["id"]]["label"] for parent in node["parents"]}}
        for node in found.values()
    }


def stages_of(nodes: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """The stages among the nodes, and the stages that each comes from; blocks are left out."""
    named = STAGES + ROUND_STAGES
    names = {name for name in nodes if name.partition(", round ")[0] in named and ", block " not in name}
    return {name: nodes[name]["from"] & names for name in names}


def test_the_stages_are_joined_by_their_inputs(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.align import align

    wanted = settings(tiny_model, tmp_path / "store")
    ran = [stage.stage for stage in align(wanted)]
    assert ran == [name for name in STAGES if name in ran]
    precompute = graph(server, "precompute")
    assert stages_of(precompute) == {
        "prepare prompts": set(),
        "check rows": {"prepare prompts"},
        "sample references": {"check rows"},
        "annotate references": {"sample references"},
        "compute quantiles": {"annotate references"},
        "score reference log-probs": {"compute quantiles"},
        "assemble training set": {"compute quantiles", "score reference log-probs"},
    }
    blocks = {name for name in precompute if name.startswith("sample references, block")}
    assert len(blocks) > 1
    assert blocks < precompute["sample references"]["from"]
    assert all(precompute[name]["from"] == {"check rows"} for name in blocks)
    assert stages_of(graph(server, "evaluate")) == {
        "sample held-out, before": set(),
        "annotate held-out, before": {"sample held-out, before"},
        "sample held-out, after": set(),
        "annotate held-out, after": {"sample held-out, after"},
        "score policy log-probs, after": {"sample held-out, after"},
        "score reference log-probs, after": {"sample held-out, after"},
        "evaluate policy": {
            "annotate held-out, before",
            "annotate held-out, after",
            "score policy log-probs, after",
            "score reference log-probs, after",
        },
        "write report": {"evaluate policy"},
    }
    flows = {node["label"].split(" ")[0]: node for node in graph(server, "align").values()}
    assert [each.split(" ")[0] for each in flows["train"]["from"]] == ["precompute"]
    assert [each.split(" ")[0] for each in flows["evaluate"]["from"]] == ["train"]

    assert all(stage.state == "Cached" for stage in align(wanted))
    again = graph(server, "precompute")
    assert stages_of(again) == stages_of(precompute)
    assert set(again) == set(stages_of(again))  # no block was computed


def test_with_the_samplers_log_probs_the_stage_compares_a_few_rows(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.precompute import precompute

    wanted = settings(
        tiny_model,
        tmp_path / "store",
        training_data={"reference_logprobs": "sampler"},
        parity={"reference_rows": 4, "reference_limit": 1e9},  # the fake engine is far from any policy
    )
    (stage,) = (each for each in precompute(wanted) if each.stage == SCORE_REFERENCE_LOGPROBS)
    assert stage.computed == 4
    found = stages_of(graph(server, "precompute"))
    assert found["score reference log-probs"] == {"compute quantiles"}
    assert found["assemble training set"] == {"compute quantiles", "score reference log-probs"}


def test_a_later_round_comes_from_the_policy_before_it(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.precompute import precompute
    from flows.train import train

    rounds = {"count": 2, "samples_per_prompt": 2}
    wanted = settings(tiny_model, tmp_path / "store", rounds=rounds)
    precompute(wanted)
    trained = [stage.stage for stage in train(wanted)]
    assert trained[0] == "train policy"
    assert trained[-1] == "train policy, round 2"
    of_run = {"flow_run_id": {"any_": [newest(server, "train")]}, "key": {"any_": ["stages"]}}
    (table,) = ask(server, "/artifacts/filter", artifacts=of_run)
    assert [row["stage"] for row in json.loads(table["data"])] == trained
    (later,) = [node for name, node in graph(server, "train").items() if name.startswith("round")]
    assert later["from"] == {"train policy"}
    assert stages_of(graph(server, "round")) == {
        "sample completions, round 2": set(),
        "annotate completions, round 2": {"sample completions, round 2"},
        "compute quantiles, round 2": {"annotate completions, round 2"},
        "score reference log-probs, round 2": {"compute quantiles, round 2"},
        "assemble training set, round 2": {
            "compute quantiles, round 2",
            "score reference log-probs, round 2",
        },
        "train policy, round 2": {"assemble training set, round 2"},
    }


def test_offline_completions_come_from_the_prompts(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    from flows.precompute import precompute

    pairs = [
        {"prompt": f"Say {n}", "chosen": "w w" if n % 2 else "w", "rejected": "v v v"} for n in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prompts = {
        "kind": "file",
        "path": str(tmp_path / "pairs.jsonl"),
        "chosen_field": "chosen",
        "rejected_field": "rejected",
    }
    wanted = settings(
        tiny_model,
        tmp_path / "store",
        prompts=prompts,
        reward={"kind": "length", "max_words": 2},
        training_data={"mode": "offline"},
    )
    precompute(wanted)
    found = stages_of(graph(server, "precompute"))
    assert found["sample references"] == found["annotate offline completions"] == {"check rows"}
    assert found["annotate references"] == {"sample references"}
    assert found["compute quantiles"] == {"annotate references", "annotate offline completions"}


def test_rows_that_shards_compute_leave_the_arrows(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No task of this run computes rows then; the stages still follow from each other."""
    from flows.precompute import precompute
    from tasks.dispatch import RowsToCompute

    class Elsewhere:
        def __init__(self, pool: str) -> None:
            """Stands for the workers of a pool."""

        def __call__(self, missing: RowsToCompute) -> int:
            blocks, step = missing.workspace.blocks, missing.step
            for plan in blocks.plan(step.recipe, step.wanted, 16):
                blocks.commit(plan, step.compute(plan, lambda rows: None)[0], step.schema, 0.1)
            return missing.count

    monkeypatch.setattr("tasks.pipeline_run.OnPool", Elsewhere)
    precompute(settings(tiny_model, tmp_path / "store"), pool="gpu")
    nodes = graph(server, "precompute")
    found = stages_of(nodes)
    assert found["sample references"] == {"check rows"}
    assert found["annotate references"] == {"sample references"}
    assert found["score reference log-probs"] == {"compute quantiles"}
    assert set(found) == set(nodes)
