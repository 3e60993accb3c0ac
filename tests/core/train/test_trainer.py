"""The trainer on the two-layer model: its loss by another road, and what may not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qrpo_core.config import ModelConfig, ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Collator, Example
from qrpo_core.errors import ObjectiveError
from qrpo_core.policy import load_model
from qrpo_core.steps.training import optimiser_steps
from qrpo_core.train.forward import policy_logprobs
from qrpo_core.train.run import train_policy
from qrpo_core.train.trainer import QRPOTrainer

BETA = 0.5


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    """Ten completions of unequal length whose stored log-probs are the model's own."""
    random = np.random.default_rng(0)
    model = load_model(tiny_model, "float32")
    made = []
    for row in range(10):
        prompt, completion = (
            random.integers(0, 256, size=size).tolist() for size in (3 + row % 3, 2 + row % 5)
        )
        reference = float(plain(model, prompt, completion).detach())
        made.append(Example(prompt, completion, float(random.normal()), BETA, reference))
    return made


def plain(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log pi(completion | prompt) from whole logits, one sequence at a time."""
    tokens = torch.tensor([[*prompt, *completion]])
    logprobs = model(input_ids=tokens).logits.float().log_softmax(-1)[0]
    return sum(logprobs[at - 1, tokens[0, at]] for at in range(len(prompt), tokens.shape[1]))  # type: ignore[return-value]


def run(examples: list[Example], tiny_model: Path, out: Path, **training: object) -> list[dict[str, float]]:
    settings = {"precision": "fp32", "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3} | training
    return train_policy(
        examples,
        tiny_model,
        out,
        model=ModelConfig(path=str(tiny_model), dtype="float32"),
        objective=ObjectiveConfig(beta=BETA),
        training=TrainingConfig.model_validate(settings),
    )


def test_log_probs_and_gradients_equal_the_plain_way(tiny_model: Path, examples: list[Example]) -> None:
    model = load_model(tiny_model, "float32")
    batch = Collator(0)(examples)
    ours = policy_logprobs(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ours.sum().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    theirs = torch.stack([plain(model, list(e.prompt_token_ids), list(e.token_ids)) for e in examples])
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    for one, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-4)


def test_the_first_loss_is_the_mean_squared_target(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    history = run(examples, tiny_model, tmp_path / "out", batch_size=10, micro_batch_size=10)
    assert history[0]["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert history[0]["loss"] == pytest.approx(np.mean([e.target**2 for e in examples]), rel=1e-4)
    assert history[0]["log_ratio_target"] == pytest.approx(np.mean([e.target / BETA for e in examples]))


def test_accumulated_micro_batches_are_the_large_batch(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    # 10 examples in batches of 4: the last step has 2, so weighting by micro-batch would show.
    large = run(examples, tiny_model, tmp_path / "a", micro_batch_size=4, epochs=2)
    small = run(examples, tiny_model, tmp_path / "b", micro_batch_size=1, epochs=2)
    assert (
        len(large)
        == len(small)
        == optimiser_steps(TrainingConfig(batch_size=4, micro_batch_size=4, epochs=2), 10)
    )
    for step, (one, two) in enumerate(zip(large, small, strict=True)):
        # Adam divides by tiny second moments, so rounding grows; a wrong weighting would be 10^4 larger.
        tolerance = 1e-5 if step == 0 else 2e-4
        assert one["loss"] == pytest.approx(two["loss"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=tolerance)


def test_training_moves_the_log_ratio_to_its_target(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    history = run(examples, tiny_model, tmp_path / "out", batch_size=10, micro_batch_size=10, epochs=60)
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert history[-1]["sign_agreement"] >= 0.9
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_dataset_without_targets_is_refused(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ObjectiveError, match="remove_unused_columns"):
        QRPOTrainer(load_model(tiny_model, "float32"), arguments, examples)
    arguments.remove_unused_columns = False
    with pytest.raises(ObjectiveError, match="unknown loss 'huber'"):
        QRPOTrainer(load_model(tiny_model, "float32"), arguments, examples, loss="huber")
