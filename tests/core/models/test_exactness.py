"""Log-probs of a bfloat16 model are as exact as a plain forward's on the same rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo_core.data.packing import pack
from qrpo_core.models.forward import policy_logprobs, token_logprobs
from qrpo_core.models.precision import careful_kernels
from qrpo_core.objective import chunked_head
from qrpo_core.objective.logprobs import label_logprobs

ROWS, LENGTH, VOCABULARY = 12, 40, 1024


def random_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def random_rows(seed):
    """Prompts of 6 tokens and completions of 6 to 34."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    lengths = torch.randint(12, LENGTH + 1, (ROWS,), generator=generator)
    rows = [line[:length].tolist() for line, length in zip(ids, lengths, strict=True)]
    return [row[:6] for row in rows], [row[6:] for row in rows]


def plain(model, prompts, completions):
    """The sums of a plain forward of each row: all logits, then a float32 log-softmax."""
    sums = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        sums.append(chosen.double().sum())
    return torch.stack(sums)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 weights", "autocast"])
def test_errors_against_float32_are_no_larger_than_a_plain_forwards(autocast):
    ours, theirs = [], []
    for seed in range(8):
        model = random_model(seed).bfloat16()
        rows = random_rows(seed)
        with torch.no_grad():
            exact = plain(model.float(), *rows)
            low = model if autocast else model.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                theirs.append(plain(low, *rows) - exact)
                ours.append(token_logprobs(low, pack(*rows)).double().sum(1) - exact)
    mine, beside = torch.stack(ours).abs().mean(), torch.stack(theirs).abs().mean()
    # 96 errors of one spread, most of them shared: their means are within a tenth of each other.
    assert mine <= 1.1 * beside
    assert beside > 0.003  # bfloat16 is seen


def test_logits_that_are_not_rounded_take_away_the_heads_own_error(monkeypatch):
    """As on CUDA, where a product of bfloat16 operands has a float32 result."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, 128, generator=generator).bfloat16()
    weight = (0.3 * torch.randn(VOCABULARY, 128, generator=generator)).bfloat16()
    labels = torch.randint(VOCABULARY, (512,), generator=generator)
    logits = states.double() @ weight.double().t()
    exact = F.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    rounded = (label_logprobs(states, weight, labels) - exact).abs()
    monkeypatch.setattr(
        chunked_head, "product", lambda left, right, out: torch.mm(left.float(), right.float(), out=out)
    )
    wide = (label_logprobs(states, weight, labels) - exact).abs()
    # Logits of 2 to 4 are 2^-6 apart in bfloat16: a label's is off by 2^-8 on average, smaller ones by less.
    assert 2**-10 < rounded.mean() < 2**-7
    assert wide.mean() < 2**-17


def test_careless_kernels_are_off():
    settings, cudnn = torch.backends.cuda.matmul, torch.backends.cuda.cudnn_sdp_enabled()
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    careful_kernels()
    try:
        assert not settings.allow_bf16_reduced_precision_reduction
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16", "autocast"])
def test_the_company_of_a_row_does_not_change_its_log_prob(arithmetic):
    """To the bit: beside another completion of its prompt or without it, among few rows or many."""
    model = random_model(0)
    if arithmetic == "bfloat16":
        model = model.bfloat16()
    prompts, completions = random_rows(0)
    prompts = [prompts[number // 2] for number in range(ROWS)]  # two completions each
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast")

    def score(rows):
        packed = pack([prompts[row] for row in rows], [completions[row] for row in rows])
        with torch.no_grad(), autocast:
            return dict(zip(rows, policy_logprobs(model, packed).tolist(), strict=True))

    whole = score([*range(ROWS)])
    one_of_each, others = score([*range(0, ROWS, 2)]), score([*range(1, ROWS, 2)])
    assert {**one_of_each, **others} == whole
    mixed = score([9, 0, 4, 8, 3])
    assert mixed == {row: whole[row] for row in mixed}
