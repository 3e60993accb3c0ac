"""Packed rows: every implementation of their attention, and models of every kind, against each row alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.data.packing import PackedRow, Segments, pack
from qrpo_core.models import packed_attention
from qrpo_core.models.forward import policy_logprobs, token_logprobs
from qrpo_core.models.packed_attention import attend_by_segments, set_attention
from qrpo_core.models.packing_check import check_packing
from qrpo_core.models.varlen import varlen
from tests.rounding import reordered

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Rows = list[tuple[list[int], list[int]]]
TOKENS = st.lists(st.integers(3, 60), min_size=1, max_size=12)


@st.composite
def groups(draw: st.DrawFn) -> Rows:
    """Rows of one to four prompts with one to four completions each, in any order."""
    prompts = draw(st.lists(TOKENS, min_size=1, max_size=4))
    rows = [
        (prompt, tokens) for prompt in prompts for tokens in draw(st.lists(TOKENS, min_size=1, max_size=4))
    ]
    return draw(st.permutations(rows))


def packed(rows: Rows) -> PackedRow:
    prompts, completions = zip(*rows, strict=True)
    return pack(prompts, completions)


def test_a_packed_row_by_hand() -> None:
    row = pack([[5, 6], [7], [5, 6]], [[8, 9], [3], [4]])
    assert row.input_ids.tolist() == [[5, 6, 8, 9, 4, 7, 3]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.labels.tolist() == [8, 9, 3, 4]
    assert row.sources.tolist() == [1, 2, 5, 1]
    assert row.shape == (3, 2)
    assert row.cells.tolist() == [0, 1, 2, 4]
    segments = row.segments
    assert (segments.lengths, segments.prefixes) == ((2, 2, 1, 1, 1), (-1, 0, 0, -1, 3))
    assert segments.query_starts.tolist() == [0, 2, 4, 5, 6, 7]
    assert segments.key_starts.tolist() == [0, 2, 6, 9, 10, 12]
    assert segments.key_index is not None
    assert segments.key_index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 5, 6]
    assert (segments.longest_query, segments.longest_key) == (128, 128)


def test_a_row_alone_is_laid_out_as_one_that_shares_its_prompt() -> None:
    """So its log-prob does not depend on whether another completion of the prompt is in the row."""
    row = pack([[5], [6]], [[7], []])
    assert (row.segments.lengths, row.segments.prefixes) == ((1, 1, 1), (-1, 0, -1))


def test_nothing_is_gathered_where_nothing_is_behind_a_prompt() -> None:
    assert pack([[5], [6]], [[], []]).segments.key_index is None
    with pytest.raises(DataError, match="no prompt tokens"):
        pack([[]], [[7]])


def dense(query: Any, key: Any, value: Any, segments: Segments, scale: float, window: int | None) -> Any:
    """The plainest way: one mask over all tokens."""
    owner = [[number] * length for number, length in enumerate(segments.lengths)]
    flat = torch.tensor([number for part in owner for number in part])
    prefix = torch.tensor(segments.prefixes)[flat]
    behind = [segments.lengths[at] if at >= 0 else 0 for at in segments.prefixes]
    places = torch.cat([torch.arange(n) + b for n, b in zip(segments.lengths, behind, strict=True)])
    seen = (flat[:, None] == flat) | (prefix[:, None] == flat)
    seen &= places <= places[:, None]
    if window is not None:
        seen &= places > places[:, None] - window
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def reference_varlen(
    q: Any, k: Any, v: Any, query_starts: Any, key_starts: Any, longest_q: int, longest_k: int, **options: Any
) -> Any:
    """What varlen_attn states: sequences side by side, causal to the lower right, a window before."""
    left, right = options["window_size"]
    assert right == 0
    outputs = []
    for at in range(len(query_starts) - 1):
        one = q[query_starts[at] : query_starts[at + 1]]
        keys, values = (x[key_starts[at] : key_starts[at + 1]] for x in (k, v))
        assert 0 < len(one) <= min(longest_q, len(keys)) <= longest_k
        repeats = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        own = torch.arange(len(keys) - len(one), len(keys))[:, None]
        others = torch.arange(len(keys))
        seen = (others <= own) & ((others >= own - left) if left >= 0 else torch.tensor(True))
        scores = torch.einsum("qhd,khd->hqk", one, keys) * options["scale"]
        outputs.append(
            torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
        )
    return torch.cat(outputs)


@settings(deadline=None, max_examples=40)
@given(groups(), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 20), st.integers(0, 2**31))
def test_every_attention_gives_the_plain_values_and_gradients(
    rows: Rows, kv_heads: int, window: int | None, seed: int
) -> None:
    """The loop of a CPU, and the inputs of the GPU's kernel by a reference of that kernel; in float64."""
    segments, noise = packed(rows).segments, torch.Generator().manual_seed(seed)
    total = sum(segments.lengths)
    draw = [
        torch.randn(1, h, total, 8, generator=noise, dtype=torch.float64) for h in (4, kv_heads, kv_heads)
    ]
    weights = torch.randn(1, total, 4, 8, generator=noise, dtype=torch.float64)

    def kernel(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return varlen(q, k, v, *rest, function=reference_varlen)

    found = []
    for function in (dense, attend_by_segments, kernel):
        inputs = [states.clone().requires_grad_() for states in draw]
        output = function(*inputs, segments, 0.35, window)
        found.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for ours in found[1:]:
        for one, expected in zip(ours, found[0], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def families() -> dict[str, Callable[[], Any]]:
    import transformers as t

    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        "qwen2, window in one layer": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        ),
        "mistral, window": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4)),
        "gemma2, softcaps and window": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZES, **gemma, attn_logit_softcapping=1.5, final_logit_softcapping=3.0)
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SIZES, **gemma)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES | {"num_key_value_heads": 4})),
        "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
    }


def made(family: str) -> Any:
    torch.manual_seed(1)
    return families()[family]().float().eval()


def alone(model: Any, rows: Rows) -> torch.Tensor:
    """Sums of each row's log-probs by the model's own eager attention, one row a pass."""
    set_attention(model, "eager")
    sums = []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        values = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(values.gather(1, torch.tensor(completion)[:, None]).double().sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", list(families()))
@settings(deadline=None, max_examples=12)
@given(rows=groups())
def test_log_probs_and_gradients_are_those_of_each_row_alone(family: str, rows: Rows) -> None:
    model, weights = made(family), torch.linspace(-1, 1, len(rows))
    ours = policy_logprobs(model, packed(rows))
    one = torch.autograd.grad((ours * weights).sum(), list(model.parameters()), allow_unused=True)
    theirs = alone(model, rows)
    other = torch.autograd.grad((theirs * weights).sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for here, there in zip(one, other, strict=True):
        if there is not None:
            # Terms of a gradient cancel: its error is measured by the largest of its kind. Two thousand
            # roundings lie between a weight and a log-prob, and as many on the way back (see test_forward).
            largest = max(1.0, float(there.abs().max()))
            torch.testing.assert_close(here, there, rtol=0, atol=reordered(2 * 2_000) * largest)


@pytest.mark.parametrize("family", list(families()))
def test_models_of_attention_alone_pass_the_check(family: str) -> None:
    model = made(family).train()
    before = model.config.to_dict()
    check_packing(model, [5, 6, 7, 8, 9], [10, 11, 12])
    check_packing(model, [5], [5])
    assert model.training
    assert model.config.to_dict() == before


def refused() -> dict[str, tuple[Callable[[], Any], str]]:
    import transformers as t

    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return {
        "mamba": (lambda: t.MambaForCausalLM(t.MambaConfig(**SIZES, state_size=4)), "Mamba"),
        "convolutions": (lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**SIZES, full_attn_idxs=[1])), "kind conv"),
        "linear attention": (
            lambda: t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**SIZES, head_dim=8, num_experts=0)),
            "linear_attention",
        ),
        "sinks": (
            lambda: t.GptOssForCausalLM(
                t.GptOssConfig(**sizes, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
            ),
            "GptOssAttention attends with s_aux",
        ),
        "positions by distance": (
            lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61)),
            "Bloom",
        ),
        "a window in the mask alone": (
            lambda: t.Qwen2MoeForCausalLM(
                t.Qwen2MoeConfig(
                    **SIZES, **experts, use_sliding_window=True, sliding_window=5, max_window_layers=1
                )
            ),
            "a sliding window that its attention is not told",
        ),
    }


@pytest.mark.parametrize("kind", list(refused()))
def test_models_that_would_mix_texts_are_refused_by_name(kind: str) -> None:
    make, message = refused()[kind]
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=message):
        check_packing(make().float(), [5, 6, 7, 8, 9], [10, 11, 12])


def test_a_model_that_leaks_is_found_by_its_numbers(tiny_model: Path) -> None:
    """A layer that hands each token's state to the next one, as a recurrent layer does."""
    model = load(tiny_model)

    def leak(module: Any, arguments: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        return states + 0.1 * torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].register_forward_hook(leak)
    with pytest.raises(ModelError, match="does not keep packed rows apart"):
        check_packing(model, [5, 6, 7], [8, 9])


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_without_segments_a_model_is_as_before(tiny_model: Path) -> None:
    """Padded rows, generation, and no trace in a saved config."""
    model = load(tiny_model).eval()
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    drawn = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4)
    token_logprobs(model, pack([[5, 6]], [[7]]))
    assert model.config._attn_implementation == packed_attention.ATTENTION
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4), drawn)
    assert packed_attention.ATTENTION not in model.config.to_json_string(use_diff=False)


def test_a_packed_row_whose_segments_are_lost_is_refused(tiny_model: Path) -> None:
    model = load(tiny_model)
    token_logprobs(model, pack([[5, 6]], [[7]]))
    mark = packed_attention.packed_mask(torch.device("cpu"))
    with pytest.raises(ModelError, match="does not get the segments"):
        model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mark, use_cache=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_of_a_gpu_gives_the_loops_results() -> None:
    assert packed_attention.flash_agrees(torch.device("cuda"))
    model, rows = made("llama").cuda(), packed([([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12])])
    exact = policy_logprobs(model, rows.to("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours = policy_logprobs(model, rows.to("cuda"))
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=0.5)
