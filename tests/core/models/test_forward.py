"""Log-probs from inside the head: against plain logits, and under everything that wraps a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from qrpo_core.common.errors import ModelError
from qrpo_core.data.packing import PackedRow, pack
from qrpo_core.models.forward import check_head, policy_logprobs
from qrpo_core.models.packed_attention import set_attention
from tests.rounding import reordered

#: Operations from a weight to a log-prob: sums over 32 and 64 features in two layers, and over 97 tokens.
ROUNDINGS = 2_000
#: A log-prob is a difference of logits, each of up to 10 nats here; a sum of log-probs has terms of one sign.
CLOSE = {"rtol": reordered(ROUNDINGS), "atol": 10 * reordered(ROUNDINGS)}

# peft asks transformers for a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def batch() -> list[tuple[list[int], list[int]]]:
    """Three rows of unequal length, (prompt, completion); two share their prompt."""
    generator = torch.Generator().manual_seed(0)
    one, two, other = torch.randint(1, 90, (3, 9), generator=generator).tolist()
    return [(one[:2], one[2:]), (other[:1], other[1:5]), (one[:2], two[4:7])]


def packed(rows: list[tuple[list[int], list[int]]] | None = None) -> PackedRow:
    prompts, completions = zip(*(batch() if rows is None else rows), strict=True)
    return pack(prompts, completions)


def first_ids() -> torch.Tensor:
    prompt, completion = batch()[0]
    return torch.tensor([[*prompt, *completion]])


def plain(
    model: Any, rows: list[tuple[list[int], list[int]]] | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """The other road: every row alone, whole logits, log-softmax, with the model's own attention."""
    before = model.config._attn_implementation
    set_attention(model, "eager")
    sums = []
    for prompt, completion in batch() if rows is None else rows:
        tokens = torch.tensor([*prompt, *completion])
        logprobs = model(input_ids=tokens[None]).logits[0].float() / temperature
        at = torch.arange(len(prompt), len(tokens))
        sums.append(logprobs.log_softmax(-1)[at - 1, tokens[at]].double().sum())
    set_attention(model, before)
    return torch.stack(sums)


def gradients(model: Any, sums: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    (sums * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def assert_same(model: Any, temperature: float = 1.0) -> None:
    ours, theirs = policy_logprobs(model, packed(), temperature), plain(model, temperature=temperature)
    # A gradient's terms cancel, down to zero in some weights: errors are measured by the largest of its kind.
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for one, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        largest = float(other.abs().max().clamp(min=1))
        torch.testing.assert_close(one, other, rtol=0, atol=reordered(2 * ROUNDINGS) * largest)


def families() -> dict[str, Callable[[], Any]]:
    import transformers as t

    two = {"sliding_window": 32, "head_dim": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama, tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=8)),
        "gemma2, softcap": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZES, **two, final_logit_softcapping=2.0)
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **two)),
        "cohere, factor": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES, **ends, logit_scale=0.3)),
        "granite, divisor": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=0.2)),
        "phi, bias": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES)),
    }


def made(family: str) -> Any:
    torch.manual_seed(1)
    return families()[family]().float().eval()


@pytest.mark.parametrize("family", list(families()))
def test_log_probs_and_gradients_equal_the_plain_way(family: str) -> None:
    model = made(family)
    before = model.config.to_dict()
    assert_same(model)
    check_head(model, first_ids())
    assert model.config.to_dict() == before
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("temperature", [0.7, 1.2])
@pytest.mark.parametrize("family", ["qwen2", "gemma2, softcap", "granite, divisor"])
def test_at_a_temperature_too(family: str, temperature: float) -> None:
    assert_same(made(family), temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(families()))
def test_honest_heads_pass_in_every_precision(family: str, dtype: torch.dtype) -> None:
    check_head(made(family).to(dtype), first_ids())


def bias_of_one_token(logits: torch.Tensor) -> torch.Tensor:
    return logits + 0.01 * torch.nn.functional.one_hot(torch.tensor(3), logits.shape[-1])


UNKNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scale 0.95": lambda logits: 0.95 * logits,
    "scale 0.999": lambda logits: 0.999 * logits,
    "scale 1.05": lambda logits: 1.05 * logits,
    "soft cap 30": lambda logits: 30 * torch.tanh(logits / 30),
    "soft cap 100": lambda logits: 100 * torch.tanh(logits / 100),
    "bias of one token": bias_of_one_token,
    "clamp": lambda logits: logits.clamp(min=-5),
    "temperature": lambda logits: logits / 1.01,
    "rounded": lambda logits: logits.bfloat16(),
    "fewer tokens": lambda logits: logits[..., :96],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama, tied", "gemma2, softcap", "granite, divisor"])
@pytest.mark.parametrize("unknown", list(UNKNOWN))
def test_whatever_else_a_model_does_to_its_logits_is_refused(
    unknown: str, family: str, dtype: torch.dtype
) -> None:
    model = made(family).to(dtype)

    def change(module: Any, arguments: Any, output: Any) -> Any:
        output["logits"] = UNKNOWN[unknown](output["logits"])
        return output

    model.register_forward_hook(change)
    with pytest.raises(ModelError, match=type(model).__name__):
        check_head(model, first_ids())


def test_heads_that_change_their_input_or_output_by_themselves(tiny_model: Path) -> None:
    """Inside the head: what stands before it is in both roads, what stands after it is not."""
    ids = first_ids()
    before = load(tiny_model).eval()
    before.lm_head.register_forward_pre_hook(lambda module, states: (0.9 * states[0],))
    check_head(before, ids)
    assert_same(before)
    after = load(tiny_model)
    after.lm_head.register_forward_hook(lambda module, states, logits: 0.999 * logits)
    with pytest.raises(ModelError, match="scales its logits in a way"):
        check_head(after, ids)

    class Scaled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 0.95 * super().forward(states)

    other = load(tiny_model)
    other.lm_head.__class__ = Scaled
    with pytest.raises(ModelError, match=r"output head of type .*Scaled"):
        check_head(other, ids)


def test_a_scale_that_cannot_be_made_neutral_is_refused(tiny_model: Path) -> None:
    """Known by its name, but read elsewhere: log-probs would be scaled on their way out."""
    model = load(tiny_model)
    model.config.logits_scaling = 2.0
    model.register_forward_hook(
        lambda module, arguments, output: (output.__setitem__("logits", output["logits"] / 2.0), output)[1]
    )
    with pytest.raises(ModelError, match="changes log-probs that its output head gives"):
        check_head(model, first_ids())


def test_the_check_draws_no_random_numbers(tiny_model: Path) -> None:
    model = load(tiny_model)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_head(model, first_ids())
    assert torch.equal(torch.rand(1), expected)


def test_everything_is_put_back_when_the_model_fails(tiny_model: Path) -> None:
    model = load(tiny_model)
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(IndexError):
        policy_logprobs(model, packed([([10**6], [3, 4])]))
    assert "forward" not in model.lm_head.__dict__
    assert model.config.final_logit_softcapping == 3.0


def test_logits_scaled_in_an_unknown_way_are_refused() -> None:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(1)
    sizes = SIZES | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    model = FalconH1ForCausalLM(FalconH1Config(**sizes, lm_head_multiplier=9.0)).train()
    with pytest.raises(ModelError, match=r"FalconH1ForCausalLM scales its logits"):
        check_head(model, torch.tensor([[5, 6, 7, 8]]))
    assert model.training
    assert all(module.training for module in model.modules())


def test_dropout_does_not_make_a_model_look_unknown(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attention_dropout=0.9)
    check_head(model.train(), torch.tensor([[5, 6, 7, 8]]))


def test_heads_that_are_not_plain_are_refused_by_name(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match=r"output head of type peft\.\S+Linear;.*leave lm_head"):
        policy_logprobs(adapted, packed())
    kept = get_peft_model(
        load(tiny_model), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with pytest.raises(ModelError, match=r"peft\.\S+ModulesToSaveWrapper.*leave lm_head"):
        policy_logprobs(kept, packed())
    model = load(tiny_model)
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ModelError, match=r"forward of its own.*device_map"):
        policy_logprobs(model, packed())
    with pytest.raises(ModelError, match="no output head"):
        policy_logprobs(load(tiny_model).model, packed())


def test_lora_changes_nothing_before_it_is_trained(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    rows = packed()
    expected = policy_logprobs(load(tiny_model), rows)
    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(policy_logprobs(adapted, rows), expected)


def test_computing_activations_again_gives_the_same_gradients(tiny_model: Path) -> None:
    rows, model = packed(), load(tiny_model)
    expected = gradients(model, policy_logprobs(model, rows))
    again = load(tiny_model).train()
    again.activation_checkpointing_enable()
    for one, other in zip(gradients(again, policy_logprobs(again, rows)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_under_autocast_the_sum_is_not_rounded(tiny_model: Path) -> None:
    """Products are bfloat16 on both roads; log-softmax is float32, sums are float64."""
    rows, model = packed(), load(tiny_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = policy_logprobs(model, rows), plain(model)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-2)
    assert (ours != ours.bfloat16()).any(), "sums are not on bfloat16's grid"
    exact = policy_logprobs(model, rows)
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=0.5)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, on which sharding has all its hooks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: Any, **policy: Any) -> Any:
    """As accelerate does: layers, embedding, then norm and head together, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = {"mesh": init_device_mesh("cpu", (1,)), "mp_policy": MixedPrecisionPolicy(**policy)}
    for layer in model.model.layers:
        fully_shard(layer, **kept)
    fully_shard(model.model.embed_tokens, **kept)
    fully_shard([model.model.norm, model.lm_head], **kept, reshard_after_forward=False)
    return fully_shard(model, **kept)


@pytest.mark.usefixtures("one_process")
class TestWrapped:
    def test_fsdp2_shards(self, tiny_model: Path) -> None:
        rows, model = packed(), load(tiny_model)
        sharded = shard(load(tiny_model))
        assert type(sharded.lm_head.weight).__name__ == "DTensor"
        ours, theirs = policy_logprobs(sharded, rows), policy_logprobs(model, rows)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(gradients(sharded, ours), gradients(model, theirs), strict=True):
            torch.testing.assert_close(one.full_tensor(), other)  # type: ignore[attr-defined]

    def test_fsdp2_in_bfloat16_does_not_round_log_probs(self, tiny_model: Path) -> None:
        rows = packed()
        exact = policy_logprobs(load(tiny_model), rows)
        sharded = shard(load(tiny_model), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        ours = policy_logprobs(sharded, rows)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=0.5)
        assert (ours != ours.bfloat16()).any()

    def test_ddp(self, tiny_model: Path) -> None:
        rows, model = packed(), load(tiny_model)
        wrapped = torch.nn.parallel.DistributedDataParallel(load(tiny_model))
        ours, theirs = policy_logprobs(wrapped, rows), policy_logprobs(model, rows)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(gradients(wrapped, ours), gradients(model, theirs), strict=True):
            torch.testing.assert_close(one, other)
