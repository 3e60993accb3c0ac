"""Log-probs at the sampling temperature, and a KL estimate in an arithmetic of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.schemas import LOGPROBS, TRAINING_SET
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.pipeline import policies, training
from qrpo_core.pipeline.evaluation import held_out_steps, kl_steps
from qrpo_core.pipeline.training_targets import derive
from tests.core.small_experiment import changed, fill, precompute

DRAWN = {"engine": "transformers", "references_per_prompt": 4, "max_new_tokens": 6}


def scored(directory: Path, rows: pa.Table, temperature: float) -> np.ndarray[Any, Any]:
    """log softmax(logits / T) of training rows, by the engine in float32."""
    columns = (rows[name].to_pylist() for name in ("prompt_token_ids", "token_ids"))
    asked = [LogprobRequest(tuple(prompt), tuple(ids)) for prompt, ids in zip(*columns, strict=True)]
    return TransformersEngine(directory, "float32").logprobs(asked, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_reference_log_probs_are_those_of_the_policy_that_was_sampled(
    settings: dict[str, Any], tiny_model: Path, temperature: float
) -> None:
    experiment = changed(settings, sampling=DRAWN | {"temperature": temperature})
    steps, _ = precompute(experiment)
    made = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    table = steps.workspace.load(made, "training_set.parquet", TRAINING_SET)
    expected = scored(tiny_model, table, temperature)
    np.testing.assert_allclose(table["ref_logprob"].to_numpy(), expected, rtol=0, atol=1e-4)
    config = steps.first.logprobs.recipe.config
    assert config == {"precision": "fp32"} | ({} if temperature == 1 else {"temperature": temperature})
    assert steps.first.train_recipe.config["temperature"] == temperature
    assert derive(steps.workspace, made).diagnostics["temperature"] == temperature


def test_training_and_its_reference_are_at_one_temperature(settings: dict[str, Any]) -> None:
    """At the first step the log-ratio is 0, as it is at temperature 1; and the card says how to sample."""
    experiment = changed(settings, sampling=DRAWN | {"temperature": 0.7})
    steps, _ = precompute(experiment)
    workspace, first = steps.workspace, steps.first
    made = training.build(
        workspace, first.train_recipe, workspace.artifacts.get(first.training_set_recipe), first.start
    )
    history = workspace.artifacts.read(made, "history.json").decode()
    assert abs(json.loads(history)[0]["log_ratio"]) < 1e-3
    card = " ".join((policies.stored(workspace, made).directory / "README.md").read_text().split())
    assert "softmax(logits / 0.7): sample it at temperature 0.7" in card
    assert "KL(policy || reference) in float32 arithmetic" in card


def test_the_kl_is_of_the_policies_as_they_are_drawn_from_in_float32(
    settings: dict[str, Any], tiny_model: Path
) -> None:
    """Whatever the precision of training; two equal policies have a KL of exactly 0."""
    sampling = DRAWN | {"temperature": 1.2}
    experiment = changed(settings, sampling=sampling, training={"precision": "bf16"})
    steps, _ = precompute(experiment)
    assert steps.first.logprobs.recipe.config == {"precision": "bf16-weights", "temperature": 1.2}
    after = held_out_steps(steps.workspace, steps.prompts, steps.reference, "after")
    both = kl_steps(after, steps.reference, steps.reference)
    fill(steps.workspace, after.samples)
    for step in both:
        assert step.recipe.config == {"precision": "fp32", "temperature": 1.2}
        fill(steps.workspace, step)
    blocks = steps.workspace.blocks.committed(both.policy.recipe)
    assert {block.facts["engine"].split("/")[-1] for block in blocks} == {"float32"}
    found = steps.workspace.blocks.read(both.policy.recipe, both.policy.wanted, LOGPROBS)
    drawn = after.samples.read(
        list(zip(*(found[n].to_pylist() for n in found.column_names[:2]), strict=True))
    )
    # What was drawn at 1.2 is less probable at 1 on average: the estimate is not that of temperature 1.
    chat = steps.workspace.chat(tiny_model)
    prompts = after.samples.prompts
    messages = dict(zip(prompts["prompt_id"].to_pylist(), prompts["messages"].to_pylist(), strict=True))
    asked = [
        LogprobRequest(tuple(chat.prompt_token_ids(messages[prompt])), tuple(ids))
        for prompt, ids in zip(found["prompt_id"].to_pylist(), drawn["token_ids"].to_pylist(), strict=True)
    ]
    expected = TransformersEngine(tiny_model, "float32").logprobs(asked, temperature=1.2)
    np.testing.assert_allclose(found["logprob"].to_numpy(), expected, rtol=0, atol=1e-4)


def test_float32_sees_a_difference_that_bfloat16_hides_or_makes_up(tiny_model: Path, tmp_path: Path) -> None:
    """Two policies that differ by less than bfloat16 resolves: the floor of an estimate under autocast."""
    from transformers import AutoModelForCausalLM

    from qrpo_core.data.packing import pack
    from qrpo_core.models.forward import policy_logprobs

    one = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1 + 1e-5 * torch.randn(weight.shape, generator=generator))
    ids = torch.randint(0, 256, (16, 40), generator=generator).tolist()
    rows = pack([row[:1] for row in ids], [row[1:] for row in ids])

    def ratio(mixed: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            first, second = (policy_logprobs(model, rows) for model in (one, other))
            return (second - first).double()

    exact, floor = ratio(False), ratio(True)
    assert float(exact.abs().max()) < 5e-3
    assert float((floor - exact).std()) > 5 * float(exact.std())


REFUSED = [
    ({"sampling": {"top_p": 0.95}}, "sampling.top_p 0.95 leaves out part of the policy"),
    (
        {"sampling": {"temperature": 0.7}, "training": {"temperature": 1.0}},
        "training.temperature 1 is not sampling.temperature 0.7",
    ),
    ({"sampling": {"top_p": 0.9}, "training_data": {"mode": "best_worst", "pool": 2}}, "sampling.top_p 0.9"),
    ({"training": {"temperature": 0.0}}, "training.temperature = 0.0 is refused"),
]


@pytest.mark.parametrize(("sections", "says"), REFUSED)
def test_quantiles_and_log_ratios_of_two_policies_are_refused(
    settings: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        changed(settings, **sections)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def offline(settings: dict[str, Any]) -> dict[str, Any]:
    fields = {"chosen_field": "good", "rejected_field": "bad"}
    cold = settings["sampling"] | {"temperature": 0.7, "top_p": 0.9}
    return {
        **settings,
        "prompts": settings["prompts"] | fields,
        "training_data": {"mode": "offline"},
        "sampling": cold,
    }


def test_which_temperature_is_trained_at(settings: dict[str, Any], offline: dict[str, Any]) -> None:
    """That of the samples where there are some; 1 on a data set's own completions; or the one given."""
    cold = settings["sampling"] | {"temperature": 0.7}
    pairs: dict[str, Any] = {**settings, "sampling": cold, "training_data": {"mode": "pairs"}}
    baseline = {**pairs, "objective": {"kind": "dpo"}}
    assert changed(settings).training_temperature == 1
    assert changed(pairs).training_temperature == 0.7
    assert changed(baseline).training_temperature == 0.7
    # Pairs may come from any distribution: top_p is the user's affair, and so is the temperature.
    assert changed(baseline, sampling={"top_p": 0.9}).training_temperature == 0.7
    assert changed(baseline, training={"temperature": 1.0}).training_temperature == 1
    for kind in ("dpo", "simpo", "rebel", "sft"):
        assert changed(offline, objective={"kind": kind}).training_temperature == 1
    with pytest.raises(ConfigError, match=r"sampling\.top_p 0\.9"):  # ranked among samples
        changed(offline)
    alone = {**offline, "training_data": {"mode": "offline", "references": "offline"}}
    assert changed(alone).training_temperature == 1
    assert changed(alone, training={"temperature": 0.7}).training_temperature == 0.7
    asked = changed({**offline, "sampling": cold})
    assert asked.training_temperature == 0.7
