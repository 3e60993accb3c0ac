"""Completion log-probs: by hand, against the plain way with gradients, padding, memory, bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.logprobs import label_logprobs
from qrpo_core.objective.losses import qrpo_squared_loss


def completion_token_logprobs(hidden, weight, tokens, mask, bias=None, chunk_tokens=None, **options):
    """log pi(token) of masked tokens, [batch, length]; hidden[:, t - 1] predicts token t."""
    states, labels = hidden[:, :-1][mask[:, 1:].bool()], tokens[:, 1:][mask[:, 1:].bool()]
    values = label_logprobs(states, weight, labels, bias, chunk_tokens=chunk_tokens, **options)
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter(mask.bool(), values)


def completion_logprobs(*args, **kwargs):
    """log pi(y|x) of each sequence, [batch]."""
    return completion_token_logprobs(*args, **kwargs).sum(dim=1)


HEADS = [
    {},
    {"logit_scale": 0.25},
    {"logit_softcap": 5.0},
    {"logit_scale": 2.0, "logit_softcap": 3.0, "bias": True},
    {"bias": True},
]


def problem(batch=3, length=9, dim=8, vocab=31, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, dim, generator=generator).to(dtype)
    weight = torch.randn(vocab, dim, generator=generator).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    tokens = torch.randint(vocab, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, 0] = False
    return hidden, weight, bias, tokens, mask


def plain(hidden, weight, tokens, mask, bias=None, logit_scale=1.0, logit_softcap=None):
    """The usual way, with all logits at once."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    chosen = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return F.pad(chosen * mask[:, 1:], (1, 0))


def with_gradients(function, leaves, upstream):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    (out * upstream).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_values_and_gradients_by_hand():
    # One state of 1 and weights log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8; token 2 is the completion.
    weight = torch.log(torch.tensor([[1.0], [2.0], [5.0]])).requires_grad_()
    hidden = torch.tensor([[[1.0], [9.0]]], requires_grad=True)
    out = completion_logprobs(hidden, weight, torch.tensor([[0, 2]]), torch.tensor([[0, 1]]))
    torch.testing.assert_close(out, torch.log(torch.tensor([0.625])))
    out.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.125], [-0.25], [0.375]]))
    slope = 0.375 * torch.log(torch.tensor(5.0)) - 0.25 * torch.log(torch.tensor(2.0))
    torch.testing.assert_close(hidden.grad, torch.tensor([[[slope], [0.0]]]))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_equals_the_plain_way_to_1e_minus_5_with_gradients(head, chunk):
    hidden, weight, bias, tokens, mask = problem()
    options = {key: value for key, value in head.items() if key != "bias"}
    leaves = [hidden, weight, bias] if head.get("bias") else [hidden, weight]
    upstream = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    chunked = with_gradients(
        lambda h, w, b=None: completion_token_logprobs(h, w, tokens, mask, b, chunk_tokens=chunk, **options),
        leaves, upstream,
    )  # fmt: skip
    usual = with_gradients(lambda h, w, b=None: plain(h, w, tokens, mask, b, **options), leaves, upstream)
    for mine, theirs in zip(chunked, usual, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    sums = completion_logprobs(
        hidden, weight, tokens, mask, bias if head.get("bias") else None, chunk, **options
    )
    torch.testing.assert_close(sums, usual[0].sum(1), rtol=1e-5, atol=1e-5)


def test_no_labels_give_no_values():
    hidden, weight, _, tokens, _ = problem()
    assert label_logprobs(hidden[0, :0], weight, tokens[0, :0]).shape == (0,)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_pass_gradcheck_in_float64(head):
    hidden, weight, bias, tokens, mask = problem(batch=2, length=4, dim=3, vocab=5, dtype=torch.float64)
    options = {key: value for key, value in head.items() if key != "bias"}
    inputs = [
        leaf.requires_grad_() for leaf in ([hidden, weight, bias] if head.get("bias") else [hidden, weight])
    ]
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: completion_logprobs(h, w, tokens, mask, b, chunk_tokens=3, **options), inputs
    )


def test_tied_weights_get_both_gradients():
    _, weight, _, tokens, mask = problem(dim=6)
    upstream = torch.tensor([[1.0], [-2.0], [0.5]])

    def model(head):
        def run(tied):
            return head(torch.tanh(F.embedding(tokens, tied)), tied)

        return with_gradients(run, [weight], upstream)

    mine = model(lambda h, w: completion_token_logprobs(h, w, tokens, mask, chunk_tokens=5))
    usual = model(lambda h, w: plain(h, w, tokens, mask))
    for a, b in zip(mine, usual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_frozen_head_or_frozen_states_get_no_gradient():
    hidden, weight, _, tokens, mask = problem()
    hidden.requires_grad_()
    completion_logprobs(hidden, weight, tokens, mask).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    states_grad, hidden = hidden.grad, hidden.detach()
    weight.requires_grad_()
    completion_logprobs(hidden, weight, tokens, mask).sum().backward()
    both = with_gradients(
        lambda h, w: completion_logprobs(h, w, tokens, mask), [hidden, weight.detach()], 1.0
    )
    torch.testing.assert_close(states_grad, both[1])
    torch.testing.assert_close(weight.grad, both[2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_whatever_it_holds(side):
    hidden, weight, _, tokens, mask = problem()
    width = (4, 0) if side == "left" else (0, 4)
    padded = F.pad(hidden, (0, 0, *width), value=float("nan"))
    padded_tokens = F.pad(tokens, width, value=-100)
    padded_mask = F.pad(mask, width, value=False)
    before = completion_logprobs(hidden, weight, tokens, mask)
    after = completion_logprobs(padded, weight, padded_tokens, padded_mask)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_permuting_the_batch_permutes_the_result():
    hidden, weight, _, tokens, mask = problem()
    order = torch.tensor([2, 0, 1])
    straight = completion_logprobs(hidden, weight, tokens, mask)
    permuted = completion_logprobs(hidden[order], weight, tokens[order], mask[order])
    torch.testing.assert_close(permuted, straight[order], rtol=1e-6, atol=1e-6)


def test_a_row_without_completion_tokens_gives_zero_and_no_gradient():
    hidden, weight, _, tokens, mask = problem()
    mask[1] = False
    out, grad_hidden, _ = with_gradients(
        lambda h, w: completion_logprobs(h, w, tokens, mask), [hidden, weight], 1.0
    )
    assert out[1] == 0.0
    assert (grad_hidden[1] == 0).all()
    empty = with_gradients(
        lambda h, w: completion_logprobs(h, w, tokens, torch.zeros_like(mask)), [hidden, weight], 1.0
    )
    assert all((part == 0).all() for part in empty)


def test_log_probs_over_the_vocabulary_sum_to_one():
    hidden, weight, _, tokens, _ = problem(batch=1, length=2, vocab=7)
    mask = torch.tensor([[0, 1]])
    total = sum(
        completion_logprobs(hidden, weight, torch.tensor([[int(tokens[0, 0]), token]]), mask).exp()
        for token in range(7)
    )
    torch.testing.assert_close(total, torch.ones(1))


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made_forward_or_backward():
    hidden, weight, _, tokens, mask = problem(batch=4, length=65, dim=4, vocab=500)
    mask[:, 1:] = True
    hidden.requires_grad_()
    weight.requires_grad_()
    chunk = 16
    with _LargestTensor() as seen:
        completion_logprobs(hidden, weight, tokens, mask, chunk_tokens=chunk).sum().backward()
    assert seen.largest == chunk * 500
    with _LargestTensor() as seen:
        plain(hidden, weight, tokens, mask).sum().backward()
    assert seen.largest == 4 * 65 * 500  # what the test can see


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
def test_bfloat16_equals_the_plain_way_within_its_rounding_and_sums_in_float32(how):
    hidden, weight, _, tokens, mask = problem(length=40, dim=32, vocab=97)
    if how != "autocast":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    upstream = torch.tensor([[1.0], [-2.0], [0.5]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        mine = with_gradients(
            lambda h, w: completion_token_logprobs(h, w, tokens, mask, chunk_tokens=17),
            [hidden, weight],
            upstream,
        )
        usual = with_gradients(lambda h, w: plain(h, w, tokens, mask), [hidden, weight], upstream)
    assert mine[0].dtype == torch.float32
    torch.testing.assert_close(mine[0], usual[0], rtol=1e-5, atol=1e-5)  # the same logits, float32 from there
    for a, b, leaf in zip(mine[1:], usual[1:], (hidden, weight), strict=True):
        assert a.dtype == leaf.dtype
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


def test_sums_near_minus_400_keep_what_bfloat16_would_lose():
    hidden, weight, _, tokens, mask = problem(batch=2, length=120, dim=16, vocab=64, seed=3)
    mask[:, 1:] = True
    low = completion_logprobs(hidden.bfloat16(), weight.bfloat16(), tokens, mask)
    assert low.abs().min() > 256
    exact = plain(hidden.bfloat16().double(), weight.bfloat16().double(), tokens, mask).sum(1)
    assert ((low.double() - exact).abs() < 0.5).all()
    assert (low != low.bfloat16().float()).any()  # a bfloat16 sum has a grid of 2 here


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": torch.zeros(2, 3, 4)}, r"\[n, dim\]"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels"),
        ({"lm_head_weight": torch.zeros(7, 5)}, r"\[vocab, 4\]"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"logit_softcap": 0.0}, "logit_softcap"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {
        "states": torch.zeros(3, 4),
        "lm_head_weight": torch.zeros(7, 4),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(ObjectiveError, match=message):
        label_logprobs(**{**arguments, **changes})


@given(
    temperature=st.floats(0.05, 20.0),
    head=st.sampled_from(HEADS),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_at_a_temperature_it_is_the_log_softmax_of_divided_logits(temperature, head, chunk, seed):
    hidden, weight, bias, tokens, mask = problem(dtype=torch.float64, seed=seed)
    options = {key: value for key, value in head.items() if key != "bias"}
    bias = bias if head.get("bias") else None
    logits = F.linear(hidden, weight, bias) * options.get("logit_scale", 1.0)
    if (cap := options.get("logit_softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    chosen = torch.log_softmax(logits[:, :-1] / temperature, dim=-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    ours = completion_token_logprobs(
        hidden, weight, tokens, mask, bias, chunk, **options, temperature=temperature
    )
    torch.testing.assert_close(ours, F.pad(chosen * mask[:, 1:], (1, 0)))


@pytest.mark.parametrize("temperature", [0.7, 1.2])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_at_a_temperature_pass_gradcheck(head, temperature):
    hidden, weight, bias, tokens, mask = problem(batch=2, length=4, dim=3, vocab=5, dtype=torch.float64)
    options = {key: value for key, value in head.items() if key != "bias"} | {"temperature": temperature}
    inputs = [
        leaf.requires_grad_() for leaf in ([hidden, weight, bias] if head.get("bias") else [hidden, weight])
    ]
    assert torch.autograd.gradcheck(
        lambda h, w, b=None: completion_logprobs(h, w, tokens, mask, b, chunk_tokens=3, **options), inputs
    )


def test_values_and_gradients_at_temperature_one_half_by_hand():
    # Logits log 1, log 2, log 5 over 1/2 are log 1, log 4, log 25: probabilities 1/30, 4/30, 25/30. The
    # gradient to the logits is (onehot - p) / T, twice what it is at temperature 1 for the same p.
    weight = torch.log(torch.tensor([[1.0], [2.0], [5.0]])).requires_grad_()
    hidden = torch.tensor([[[1.0], [9.0]]], requires_grad=True)
    ids, mask = torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    out = completion_logprobs(hidden, weight, ids, mask, temperature=0.5)
    torch.testing.assert_close(out, torch.log(torch.tensor([25 / 30])))
    out.sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-2 / 30], [-8 / 30], [10 / 30]]))
    slope = (10 * torch.log(torch.tensor(5.0)) - 8 * torch.log(torch.tensor(2.0))) / 30
    torch.testing.assert_close(hidden.grad, torch.tensor([[[slope], [0.0]]]))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_at_a_temperature_the_loss_is_least_at_the_tempered_optimum(temperature):
    """pi*_T = pi_ref_T exp(R / beta) / Z, both policies at the temperature: the fixed point of QRPO."""
    generator = torch.Generator().manual_seed(0)
    beta, vocab = 0.5, 6
    rewards = torch.rand(vocab, generator=generator, dtype=torch.float64)
    reference = torch.randn(vocab, generator=generator, dtype=torch.float64)
    log_reference = torch.log_softmax(reference / temperature, 0)
    log_partition = torch.logsumexp(log_reference + rewards / beta, 0)
    target = rewards - beta * log_partition
    # One state of 1, so the head's weight is the logits; every token is a completion of one token.
    logits = reference.clone().requires_grad_()
    ids = torch.stack([torch.zeros(vocab, dtype=torch.long), torch.arange(vocab)], 1)
    mask = torch.tensor([[0, 1]]).expand(vocab, 2)
    ones = torch.ones(vocab, 2, 1, dtype=torch.float64)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimiser.zero_grad()
        policy = completion_logprobs(ones, logits[:, None], ids, mask, temperature=temperature)
        loss = qrpo_squared_loss(policy, log_reference, target, torch.full((vocab,), beta)).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    optimum = torch.softmax(log_reference + rewards / beta, 0)
    torch.testing.assert_close(torch.softmax(logits.detach() / temperature, 0), optimum, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(temperature):
    hidden, weight, _, tokens, mask = problem()
    with pytest.raises(ObjectiveError, match="temperature must be a number above 0"):
        completion_logprobs(hidden, weight, tokens, mask, temperature=temperature)
