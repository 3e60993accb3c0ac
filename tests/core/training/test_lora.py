"""Adapters: the layers that can have them, and merges that change the policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, ModelError
from qrpo_core.models.loading import load_model
from qrpo_core.training.lora import check_targets
from tests.core.training.runs import Train


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning", "ignore:.*tied:UserWarning")  # peft's own
def test_a_merge_into_the_head_as_well_is_refused(
    saved_model: Callable[..., Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = saved_model(tied=True)
    lora: dict[str, Any] = {"lora_rank": 4, "lora_targets": ["embed_tokens", "q_proj"], "learning_rate": 1e-2}
    with pytest.raises(ConfigError, match=r"layer model\.embed_tokens, whose weight is also that of lm_head"):
        train(start, **lora)
    monkeypatch.setattr("qrpo_core.training.lora.check_targets", lambda model, targets: None)
    with pytest.raises(ModelError, match=r"the merge of the adapters gives another policy .*lora_targets"):
        train(start, **lora)
    assert not (tmp_path / "one").exists()


def test_a_merge_done_twice_is_refused(
    tiny_model: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(adapted: Any) -> Any:
        for name, module in adapted.named_modules():
            if name.endswith("q_proj"):
                module.scaling["default"] *= 2
        return adapted.merge_and_unload()

    monkeypatch.setattr("qrpo_core.training.saving.merge", twice)
    with pytest.raises(ModelError, match="the merge of the adapters gives another policy"):
        train(tiny_model, lora_rank=4, learning_rate=1e-2)


def test_embeddings_of_their_own_take_adapters(tiny_model: Path, train: Train) -> None:
    comparison = train(
        tiny_model, lora_rank=4, lora_targets=["embed_tokens", "q_proj"], learning_rate=1e-2
    ).comparison
    assert comparison is not None
    assert comparison.survival.share == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("tied", "target", "problem"),
    [
        (True, "embed_tokens", "layer model.embed_tokens, whose weight is also that of lm_head"),
        (True, "model.embed_tokens", "layer model.embed_tokens, whose weight is also that of lm_head"),
        (True, "lm_head", "layer lm_head, whose weight is also that of model.embed_tokens"),
        (False, "lm_head", "the output head lm_head"),
        (False, "mlp", "a LlamaMLP, which takes no low-rank adapters"),
        (False, "input_layernorm", "a LlamaRMSNorm, which takes no low-rank adapters"),
        (False, "embed", "which is no layer of LlamaForCausalLM"),
        (False, ".*_proj", "which is no layer of LlamaForCausalLM"),
    ],
)
def test_targets_that_cannot_have_adapters_are_named(
    saved_model: Callable[..., Path], tied: bool, target: str, problem: str
) -> None:
    model = load_model(saved_model(tied=tied), "float32")
    with pytest.raises(ConfigError, match=problem) as error:
        check_targets(model, ("q_proj", target))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(error.value.remedy)
    assert "lm_head" not in str(error.value.remedy)


@pytest.mark.parametrize("targets", [("all-linear", "q_proj"), ("embed_tokens", "all-linear")])
def test_all_linear_beside_other_names_is_refused(tiny_model: Path, targets: tuple[str, ...]) -> None:
    """peft would take it for a name that it does not find, and train the others alone."""
    with pytest.raises(ConfigError, match=r"names all-linear beside .*give all-linear alone"):
        check_targets(load_model(tiny_model, "float32"), targets)


@pytest.mark.parametrize("tied", [True, False])
def test_targets_of_every_day_pass(saved_model: Callable[..., Path], tied: bool) -> None:
    model = load_model(saved_model(tied=tied), "float32")
    for targets in (("all-linear",), ("q_proj", "v_proj"), ("model.layers.0.mlp.up_proj",)):
        check_targets(model, targets)
    if not tied:
        check_targets(model, ("embed_tokens",))
