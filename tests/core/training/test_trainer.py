"""The trainer on the two-layer model: its numbers, its objectives, and the arguments that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Collator, Example, Item, Pair
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.objective_kinds import KINDS as OBJECTIVES
from qrpo_core.training.trainer import QRPOTrainer
from tests.core.training.runs import BETA, history, load, make_trainer, run_trainer, unknown

KINDS = tuple(OBJECTIVES)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_the_first_loss_is_the_mean_squared_target(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    first = history(run_trainer(examples, tiny_model, tmp_path, batch_size=11))[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=unknown(examples))
    assert first["kl"] == pytest.approx(0.0, abs=unknown(examples) ** 2)
    assert first["loss"] == pytest.approx(np.mean([e.target**2 for e in examples]), abs=4 * unknown(examples))
    assert first["target"] == pytest.approx(np.mean([e.target for e in examples]))
    assert first["log_ratio_target"] == pytest.approx(np.mean([e.target / BETA for e in examples]))
    assert first["completion_tokens"] == pytest.approx(np.mean([len(e.token_ids) for e in examples]))


@pytest.mark.parametrize(("batch_size", "first"), [(11, 1.0), (3, 0.0)])
def test_an_only_step_has_no_warm_up(
    tiny_model: Path, examples: list[Example], tmp_path: Path, batch_size: int, first: float
) -> None:
    """A share of four steps is one step at least, which has learning rate 0; of one step it is none."""
    settings = {
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
    }
    trainer = run_trainer(examples, tiny_model, tmp_path, batch_size=batch_size, **settings)
    assert history(trainer)[0]["learning_rate"] == pytest.approx(first * 1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_at_a_temperature_the_policy_is_the_tempered_one(
    tiny_model: Path, examples: list[Example], tmp_path: Path, temperature: float
) -> None:
    """Reference log-probs at the temperature make the first log-ratio 0; those at 1 do not."""
    asked = [LogprobRequest(tuple(e.prompt_token_ids), tuple(e.token_ids)) for e in examples]
    scored = TransformersEngine(tiny_model, "float32").logprobs(asked, temperature=temperature)
    items = [replace(e, ref_logprob=float(value)) for e, value in zip(examples, scored, strict=True)]
    trainer = run_trainer(items, tiny_model, tmp_path / "all", batch_size=11, temperature=temperature)
    first = history(trainer)[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=unknown(items))
    assert first["loss"] == pytest.approx(np.mean([e.target**2 for e in examples]), abs=4 * unknown(items))
    other = history(
        run_trainer(examples, tiny_model, tmp_path / "at 1", batch_size=11, temperature=temperature)
    )[0]
    expected = np.mean([value - e.ref_logprob for e, value in zip(examples, scored, strict=True)])
    assert other["log_ratio"] == pytest.approx(expected, abs=unknown(examples))
    assert abs(expected) > 1


def test_an_impossible_temperature_is_refused(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="temperature 0"):
        make_trainer(examples, load(tiny_model), tmp_path, temperature=0)


def test_bfloat16_is_close(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    exact = history(run_trainer(examples, tiny_model, tmp_path / "a", num_train_epochs=1))
    mixed = run_trainer(examples, tiny_model, tmp_path / "b", num_train_epochs=1, bf16=True)
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}
    nats = 0.3  # 8 tokens, whose logits of up to 8 are known to 1/32
    for one, two in zip(exact, history(mixed), strict=True):
        assert one["log_ratio"] == pytest.approx(two["log_ratio"], abs=nats)
        # The root mean square of residuals moves by no more than beta times the log-ratios do.
        assert one["loss"] ** 0.5 == pytest.approx(two["loss"] ** 0.5, abs=BETA * nats)
    assert history(mixed)[0]["log_ratio"] != exact[0]["log_ratio"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_brings_its_loss_down(
    tiny_model: Path, examples: list[Example], pairs: list[Pair], tmp_path: Path, kind: Any
) -> None:
    objective = ObjectiveConfig(kind=kind, **({} if kind == "best_of_n" else {"beta": BETA}))
    # Only TUP's loss has log Z.
    calibrated = [replace(each, log_partition=0.1) for each in examples]
    items: Sequence[Item] = pairs if objective.pairwise else calibrated
    settings: dict[str, Any] = {"optim": "adamw_torch", "num_train_epochs": 20, "batch_size": 11}
    settings["learning_rate"] = 1e-3
    entries = history(
        run_trainer(items, tiny_model, tmp_path, objective=objective, max_tokens=99, **settings)
    )
    # Cross-entropy with labels near 1/2 ends at their entropy.
    assert entries[-1]["loss"] < (0.97 if kind == "tup" else 0.6) * entries[0]["loss"]
    if kind == "qrpo":
        assert entries[-1]["sign_agreement"] >= 0.9
    if kind == "dpo":
        assert entries[-1]["accuracy"] == 1
        assert entries[-1]["margin"] > 0


@pytest.mark.parametrize(("limit", "clipped"), [(1e-9, [2, 2]), (1e9, [0, 0]), (0.0, None)])
def test_steps_whose_gradient_was_clipped_are_counted(
    tiny_model: Path, examples: list[Example], tmp_path: Path, limit: float, clipped: list[int] | None
) -> None:
    """Four steps, logged two by two."""
    settings: dict[str, Any] = {"max_grad_norm": limit, "max_steps": 4, "logging_steps": 2}
    entries = history(run_trainer(examples, tiny_model, tmp_path, **settings))
    found = [entry.get("clipped_steps") for entry in entries]
    assert found == ([None, None] if clipped is None else clipped)


def test_only_the_adapters_change(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules="all-linear"))
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    trainer = make_trainer(examples, adapted, tmp_path, optim="adamw_torch", max_tokens=30)
    trainer.train()
    changed = {n for n, weight in adapted.named_parameters() if not torch.equal(weight.detach(), before[n])}
    assert changed == {name for name in before if ".lora_" in name}
    assert history(trainer)[-1]["loss"] < history(trainer)[0]["loss"] * 2
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dataloader_drop_last": True}, "dataloader_drop_last"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size: set max_tokens"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
            ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "num_steps"),
        ],
    )
    def test_arguments_that_would_be_ignored(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path, settings: Any, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            make_trainer(examples, load(tiny_model), tmp_path, **settings)

    def test_data_of_its_own_to_evaluate_on(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ConfigError, match="does not support eval_dataset"):
            QRPOTrainer(load(tiny_model), arguments, examples, eval_dataset=examples)
        for name in ("max_tokens", "batch_size"):
            with pytest.raises(ConfigError, match=f"{name} is 0"):
                QRPOTrainer(load(tiny_model), arguments, examples, **{name: 0})

    def test_a_sequence_beyond_the_model(self, tiny_model: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"sequence of 513 tokens exceeds the model's 512 \[item 0\]"):
            make_trainer([Example([1], [2] * 512, ref_logprob=-1.0)], load(tiny_model), tmp_path)


def test_a_loss_that_is_not_a_number_is_seen(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load(tiny_model)
    trainer = make_trainer(examples, model, tmp_path, logging_nan_inf_filter=True)
    model.model.norm.weight.data[:] = float("nan")
    trainer.train()
    assert np.isnan(history(trainer)[0]["loss"])


def test_targets_stay_float64_under_deepspeed(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """The Trainer would cast every float to DeepSpeed's dtype."""
    trainer = make_trainer(examples, load(tiny_model), tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = trainer._prepare_inputs(Collator()(examples))
    assert batch["target"].dtype == batch["ref_logprob"].dtype == torch.float64


def test_fsdp_rounds_neither_log_probs_nor_gradients() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    QRPOTrainer._keep_full_precision(SimpleNamespace(accelerator=accelerator))  # type: ignore[arg-type]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.float32,
        None,
    )
