"""What training does to decoder layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo_core.common.errors import ConfigError
from qrpo_core.data.collator import Example
from qrpo_core.objective.head_kernels import compiled, probabilities, statistics
from qrpo_core.training.layers import compile_layers, decoder_layers, recompute_activations
from tests.core.training.runs import history, load, make_trainer, run_trainer


@pytest.mark.parametrize(
    ("share", "chosen"), [(0, []), (0.25, [3]), (0.5, [1, 3]), (0.75, [1, 2, 3]), (1, [0, 1, 2, 3])]
)
def test_the_layers_that_compute_again_are_spread_evenly(share: float, chosen: list[int]) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes))
    recompute_activations(model, share)
    layers = decoder_layers(model)
    assert [place for place, layer in enumerate(layers) if layer.gradient_checkpointing] == chosen


def test_activations_that_are_computed_again_are_not_kept(tiny_model: Path) -> None:
    sizes = []
    for share in (0.0, 0.5, 1.0):
        model, kept = load(tiny_model).train(), []
        recompute_activations(model, share)

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.arange(64).view(1, -1))
        sizes.append(sum(tensor.numel() for tensor in kept))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks, at a break
def test_compiled_layers_give_the_same_losses(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """Microbatches of every length, half of the layers computed again; a few graphs for them all.

    On a CPU a graph ends at the loop over a packed row's segments.
    """
    settings = {"max_tokens": 30, "num_train_epochs": 1, "optim": "adamw_torch_fused"}
    plain = history(run_trainer(examples, tiny_model, tmp_path / "plain", **settings))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model = load(tiny_model)
    recompute_activations(model, 0.5)
    trainer = make_trainer(examples, model, tmp_path / "compiled", compile="always", **settings)
    trainer.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 16 + 2  # the head's kernels
    assert compiled(statistics)
    assert compiled(probabilities)
    for entry, expected in zip(history(trainer), plain, strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert entry["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    trainer.restore_weights()
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))
    assert not compiled(statistics)


def test_layers_are_compiled_where_it_pays(tiny_model: Path) -> None:
    model = load(tiny_model)
    for choice in ("never", "auto"):  # auto: not on a CPU
        compile_layers(model, choice, torch.device("cpu"))
        assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no decoder layers .*: set it to 0"):
        recompute_activations(nn.Linear(2, 2), 0.5)
    recompute_activations(nn.Linear(2, 2), 0.0)
