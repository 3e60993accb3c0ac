"""The formulas of memory against the live tensors of real steps, to 10 %, and by hand where that is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    TrainerCallback,
    TrainingArguments,
)

from qrpo_core.config import TrainingConfig
from qrpo_core.data.collator import Example
from qrpo_core.engines.base import LogprobRequest
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.models.memory import ModelShape
from qrpo_core.training.memory import StepMemory, inference_memory, training_memory
from qrpo_core.training.trainer import QRPOTrainer
from tests.live_bytes import LiveBytes

NEAR = 0.1
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
#: A vocabulary beside which the layers are small, in rows of 64 tokens.
WIDE_HEAD = {"vocab_size": 8000, "num_hidden_layers": 2}


def rows(length: int, count: int, vocabulary: int) -> list[Example]:
    """Prompts of a quarter of the tokens, completions of the others."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, vocabulary, length).tolist() for _ in range(count)]
    cut = length // 4
    return [Example(row[:cut], row[cut:], target=0.1, beta=0.1, ref_logprob=-60.0) for row in tokens]


class Peaks(TrainerCallback):  # type: ignore[misc]
    """The peak of every step. The first one has no moments of Adam's."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.peaks = live, list[int]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.live.peak = self.live.live

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.peaks.append(self.live.peak)


def measured_step(
    config: dict[str, Any], training: TrainingConfig, length: int, max_tokens: int, out: Path
) -> int:
    """The peak of the second optimiser step, of two rows."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    if training.lora_rank is not None:
        from qrpo_core.training.lora import add_adapters

        model = add_adapters(model, training)
    arguments = TrainingArguments(
        str(out),
        use_cpu=True,
        bf16=training.precision == "bf16",
        num_train_epochs=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = QRPOTrainer(
        model,
        arguments,
        rows(length, 4, config["vocab_size"]),
        batch_size=2,
        max_tokens=max_tokens,
        activation_checkpointing=training.activation_checkpointing,
        weights_dtype=training.trained_dtype,
        frozen_dtype=training.lora_base,
    )
    live = LiveBytes([*model.parameters(), *model.buffers(), *trainer._low_bits.values()])
    peaks = Peaks(live)
    trainer.add_callback(peaks)
    with live:
        trainer.train()
    return peaks.peaks[-1]


STEPS: dict[str, tuple[dict[str, Any], dict[str, Any], int, bool]] = {
    "bf16": ({}, {}, 256, False),
    "float32 weights": ({}, {"weights_dtype": "float32"}, 256, False),
    "float32": ({}, {"precision": "fp32"}, 256, False),
    "half of the layers again": ({}, {"activation_checkpointing": 0.5}, 256, False),
    "all layers again": ({}, {"activation_checkpointing": 1.0}, 256, False),
    "two passes": ({}, {}, 256, True),
    "adapters": ({}, {"lora_rank": 8}, 256, False),
    "adapters on bfloat16": ({}, {"lora_rank": 8, "lora_base": "bfloat16"}, 256, False),
    "wide head": (WIDE_HEAD, {}, 64, False),
    "wide head, float32, two passes": (WIDE_HEAD, {"precision": "fp32"}, 64, True),
    "head of its own": (WIDE_HEAD | {"tie_word_embeddings": False}, {}, 64, False),
    "wider": ({"hidden_size": 256, "intermediate_size": 700, "num_key_value_heads": 4}, {}, 128, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_takes_what_the_formula_says(name: str, tmp_path: Path) -> None:
    changes, settings, length, split = STEPS[name]
    config, training = SMALL | changes, TrainingConfig(**settings)
    shape = ModelShape.of_config(config | {"model_type": "llama"})
    assert shape is not None
    tokens = length if split else 2 * length
    labels = tokens * 3 // 4
    formula = training_memory(shape, training, tokens, label_tokens=labels, several_passes=split)
    peak = measured_step(config, training, length, tokens, tmp_path)
    assert formula.total == pytest.approx(peak, rel=NEAR), formula


@pytest.mark.parametrize(
    "settings", [{}, {"weights_dtype": "float32"}, {"precision": "fp32"}], ids=["bf16", "float32", "fp32"]
)
@pytest.mark.parametrize("changes", [{}, WIDE_HEAD])
def test_log_probs_take_what_the_formula_says(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, length = SMALL | changes, 256 if not changes else 64
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    training = TrainingConfig(**settings)
    # The same arithmetic on every machine: bfloat16 is slow here and there, and nowhere wrong.
    monkeypatch.setattr("qrpo_core.models.precision.native_bfloat16", lambda device: True)
    engine = TransformersEngine(tmp_path, precision=training.arithmetic, batch_tokens=2 * length)
    asked = [LogprobRequest(tuple(r.prompt_token_ids), tuple(r.token_ids)) for r in rows(length, 4, 500)]
    engine.logprobs(asked[:1])  # the check of the head, once
    with LiveBytes([*engine._model.parameters(), *engine._model.buffers()]) as live:
        engine.logprobs(asked)
    shape = ModelShape.of_config(config | {"model_type": "llama"})
    assert shape is not None
    formula = inference_memory(shape, training, 2 * length, label_tokens=2 * length * 3 // 4)
    assert sum(formula.values()) == pytest.approx(live.peak, rel=NEAR), formula


FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config, GraniteConfig]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(
    family: type[PreTrainedConfig], tied: bool, tmp_path: Path
) -> None:
    config = family(**SMALL | {"tie_word_embeddings": tied, "hidden_size": 512, "intermediate_size": 1500})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    saved = family.from_pretrained(tmp_path).to_diff_dict()  # as in the file, without what is a default
    shape = ModelShape.of_config(saved)
    assert shape is not None
    assert shape.known
    assert shape.tied == tied
    assert shape.parameters == pytest.approx(sum(each.numel() for each in model.parameters()), rel=0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_layer_keeps_what_the_formula_says() -> None:
    torch._dynamo.reset()
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 1})).train().model
    (layer,) = model.layers
    layer.compile(backend="aot_eager_decomp_partition")  # keeps what inductor keeps
    hidden = torch.randn(1, 200, SMALL["hidden_size"], requires_grad=True)  # no other size is 200
    rotary = model.rotary_emb(hidden, torch.arange(200)[None])
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if 200 in tensor.shape and not any(tensor.data_ptr() == each.data_ptr() for each in rotary):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(hidden, position_embeddings=rotary)
    shape = ModelShape.of_config(SMALL | {"model_type": "llama"})
    assert shape is not None
    expected = 200 * shape.layer_activations(mixed=True, compiled=True)
    assert sum(each.untyped_storage().nbytes() for each in kept.values()) == pytest.approx(expected, rel=NEAR)
    assert expected < 0.8 * 200 * shape.layer_activations(mixed=True)


def test_layers_of_other_kinds_have_no_figures() -> None:
    assert ModelShape.of_config(SMALL | {"model_type": "mixtral", "num_local_experts": 8}) is None
    assert ModelShape.of_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12}) is None
    other = ModelShape.of_config({"model_type": "new", "text_config": SMALL})
    assert other is not None
    assert not other.known


def test_eight_billion_by_hand() -> None:
    """Llama 3.1 8B: 14 or 16 bytes for each of 8.03 billion; eight shards; adapters on bfloat16."""
    shape = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, tied=False, positions=131072)
    assert shape.parameters == pytest.approx(8.03e9, rel=0.001)

    def step(**settings: Any) -> StepMemory:
        return training_memory(shape, TrainingConfig(**settings), 8192, gpu_memory=85_000_000_000)

    default = step()
    assert default.weights + default.gradients + default.optimiser == 14 * shape.parameters
    assert default.copies == 0
    whole = step(weights_dtype="float32", compile="never")
    assert whole.weights + whole.gradients + whole.optimiser == 16 * shape.parameters
    assert whole.copies == 2 * (shape.parameters - 2 * shape.embedding_parameters)
    # 26 d + 2 (2 q + 4 kv) + 8 f + 4 h, a token and layer; see models/memory.py.
    token = 26 * 4096 + 4 * (4096 + 2 * 1024) + 8 * 14336 + 4 * 32 + 8
    assert whole.activations == pytest.approx(8192 * (32 * token + 2 * 4 * 4096))
    token += -16 * 4096 - 2 * 14336
    assert step().activations == pytest.approx(8192 * (32 * token + 2 * 4 * 4096))
    shared = step(parallel="fsdp", processes=8, activation_checkpointing=1.0)
    assert shared.weights + shared.gradients + shared.optimiser == pytest.approx(
        2 * shape.parameters, rel=1e-6
    )
    assert shared.total < 85_000_000_000 < whole.total
    adapters = step(lora_rank=16, lora_base="bfloat16", activation_checkpointing=1.0)
    assert 2 * shape.parameters < adapters.total < 3 * shape.parameters
