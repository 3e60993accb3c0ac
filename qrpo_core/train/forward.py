"""Completion log-probabilities of a causal language model, without its logits.

One function for both sides of the log-ratio: the stored reference log-probs and the trained policy's, so
that at the first step they differ by nothing but padding.

For the duration of a call the output head's forward is another: it takes the hidden states and gives each
completion token's log-prob where the logits would be. So the head's weight is read where every wrapper
expects it (DDP, FSDP2 and DeepSpeed's ZeRO-3 hold it whole only there), and the log-probs leave by the
model's own output, whose hooks those wrappers use in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from qrpo_core.errors import ModelError
from qrpo_core.objective.logprobs import CHUNK_TOKENS, completion_token_logprobs

#: A CPU is as fast with chunks of 256 tokens as of 1024 (measured: 1200 tokens, 49152 x 576 head, forward and
#: backward, one core, 3.98 against 4.43 s), in a quarter of the memory. An accelerator reads and writes the
#: head's gradient once a chunk, so its chunks stay large.
_CPU_CHUNK_TOKENS = 256

#: Tokens of a sequence on which `check_head` looks at the logits, at most.
CHECKED_TOKENS = 64

#: Roundings of the largest logit that two ways of scaling, capping and normalising logits may differ by.
_ROUNDINGS = 32

#: (owner, name, the value with which it changes no logits) of what a model does to its logits.
_Settings: TypeAlias = list[tuple[Any, str, float | None]]


def policy_logprobs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log pi(completion | prompt) in nats, float32 [rows]: the sum of `token_logprobs`."""
    return token_logprobs(model, input_ids, attention_mask, completion_mask, temperature).sum(dim=1)


def token_logprobs(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log pi(token | what is before it) of completion tokens in nats, 0 elsewhere; float32 [rows, length].

    Parameters
    ----------
    model : a causal language model of transformers, as it is or wrapped (DDP, FSDP2, DeepSpeed, PEFT).
    input_ids, attention_mask : [rows, length], padded on the right.
    completion_mask : [rows, length], true at the completion tokens.
    temperature : pi is softmax(logits / temperature).

    Raises
    ------
    ModelError : the output head is missing or is not a plain linear layer.
    ObjectiveError : a completion that begins a row; nothing predicts its first token.
    """
    inner = causal_model(model)
    head = _plain_head(inner)
    scale, softcap, settings = _logit_scaling(inner)

    def logprobs(hidden: torch.Tensor) -> torch.Tensor:
        chunk = _CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else CHUNK_TOKENS
        values = completion_token_logprobs(
            hidden, head.weight, input_ids, completion_mask, head.bias, chunk, scale, softcap, temperature
        )
        return values.unsqueeze(-1).clone()  # FSDP2 hangs its hook on the output, which must not be a view

    with _replaced(head, logprobs, settings):
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    values: torch.Tensor = output["logits"][..., 0]
    return values


def check_head(model: Any, input_ids: torch.Tensor) -> None:
    """Refuse a model whose logits are more than what `token_logprobs` takes them for.

    Two passes over input_ids [1, length] without gradients, in evaluation mode (dropout would make them
    differ); the mode is put back. In the first the head gives float32 logits, and what the model makes of
    them must be what is known of it, at every position and for every token: a factor, a cap or a bias that
    is not known shows, however coarse the arithmetic of the weights. In the second the head gives
    log-probs, which must leave the model as they are. Raises ModelError.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            _compare_logits(model, input_ids)
            _compare_passed_on(model, input_ids)
    finally:
        for module in training:
            module.training = True


def _compare_logits(model: Any, input_ids: torch.Tensor) -> None:
    """Refuse a model that makes other logits of its head's float32 products than `_logit_scaling` says."""
    inner = causal_model(model)
    name, head = type(inner).__name__, _plain_head(inner)
    scale, softcap, _ = _logit_scaling(inner)
    products: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        products.append(torch.nn.functional.linear(hidden.float(), head.weight.float(), bias))
        return products[-1].clone()

    theirs = _run(model, input_ids, head, forward, [])
    if len(products) != 1 or products[0].shape[:-1] != input_ids.shape:
        raise ModelError(f"{name} does not take its logits from its output head", remedy="use another model")
    ours = products[0] * scale
    if softcap is not None:
        ours = softcap * torch.tanh(ours / softcap)
    if theirs.shape != ours.shape:
        raise ModelError(
            f"{name} makes logits {list(theirs.shape)} of its output head's {list(ours.shape)}",
            remedy="use another model",
        )
    expected = ours.log_softmax(-1)
    difference = (theirs.float().log_softmax(-1) - expected).abs().max()
    # Both come from the same products; what is left is the rounding of a few operations on each.
    largest = torch.maximum(ours.abs().max(), expected.abs().max())
    if not difference <= _ROUNDINGS * torch.finfo(torch.float32).eps * largest:
        raise ModelError(
            f"{name} scales its logits in a way that is not known here: a token's log-prob differs by "
            f"{float(difference):.3g} nats",
            remedy="use another model",
        )


def _compare_passed_on(model: Any, input_ids: torch.Tensor) -> None:
    """Refuse a model that changes log-probs which its head gives in place of logits."""
    inner = causal_model(model)
    given = torch.linspace(-40.0, -0.5, input_ids.shape[1], device=input_ids.device).view(1, -1, 1)
    settings = _logit_scaling(inner)[2]
    found = _run(model, input_ids, _plain_head(inner), lambda hidden: given.clone(), settings)
    if not torch.equal(found.float(), given):
        raise ModelError(
            f"{type(inner).__name__} changes log-probs that its output head gives", remedy="use another model"
        )


def _run(
    model: Any,
    input_ids: torch.Tensor,
    head: nn.Linear,
    forward: Callable[[torch.Tensor], torch.Tensor],
    settings: _Settings,
) -> torch.Tensor:
    """The model's logits with another forward in its head."""
    with _replaced(head, forward, settings):
        output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    logits: torch.Tensor = output["logits"]
    return logits


def causal_model(model: Any) -> Any:
    """The model of transformers inside its wrappers: DDP and DeepSpeed (`.module`), then PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _replaced(
    head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor], settings: _Settings
) -> Iterator[None]:
    """Give the head another forward and some settings neutral values, and put all of them back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, neutral in settings:
            setattr(owner, name, neutral)
        head.__dict__["forward"] = forward
        yield
    finally:
        head.__dict__.pop("forward", None)
        for owner, name, value in before:
            setattr(owner, name, value)


def _plain_head(inner: Any) -> nn.Linear:
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        found = "no output head" if head is None else f"an output head of type {kind}"
        raise ModelError(
            f"{type(inner).__name__} has {found}; log-probs are computed from a plain linear one",
            remedy="leave lm_head (and a tied embedding) out of the adapter's targets and modules to save",
        )
    if "forward" in head.__dict__:
        raise ModelError(
            f"the output head of {type(inner).__name__} has a forward of its own",
            remedy="load the model on one device, without device_map; FSDP shards it over several",
        )
    return head


def _logit_scaling(inner: Any) -> tuple[float, float | None, _Settings]:
    """What the model does to its logits after the head: factor, softcap, and the settings to make neutral.

    Logits z become c tanh(scale z / c). Known: `logit_scale` of the model (Cohere: times),
    `logits_scaling` (Granite: divided by) and `final_logit_softcapping` (Gemma) of the config. What is not
    known is found by `check_head`.
    """
    config = inner.config.get_text_config()
    scale: float = 1.0
    settings: _Settings = []
    factor = getattr(inner, "logit_scale", None)
    if isinstance(factor, int | float):
        scale *= factor
        settings.append((inner, "logit_scale", 1.0))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale /= divisor
        settings.append((config, "logits_scaling", 1.0))
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        settings.append((config, "final_logit_softcapping", None))
    return scale, softcap, settings
