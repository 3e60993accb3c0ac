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
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qrpo_core.errors import ModelError
from qrpo_core.objective.logprobs import CHUNK_TOKENS, completion_token_logprobs

#: A CPU is as fast with chunks of 256 tokens as of 1024 (measured: 1200 tokens, 49152 x 576 head, forward and
#: backward, one core, 3.98 against 4.43 s), in a quarter of the memory. An accelerator reads and writes the
#: head's gradient once a chunk, so its chunks stay large.
_CPU_CHUNK_TOKENS = 256


def policy_logprobs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """log pi(completion | prompt) in nats, float32 [rows]: the sum of `token_logprobs`."""
    return token_logprobs(model, input_ids, attention_mask, completion_mask).sum(dim=1)


def token_logprobs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """log pi(token | what is before it) of completion tokens in nats, 0 elsewhere; float32 [rows, length].

    Parameters
    ----------
    model : a causal language model of transformers, as it is or wrapped (DDP, FSDP2, DeepSpeed, PEFT).
    input_ids, attention_mask : [rows, length], padded on the right.
    completion_mask : [rows, length], true at the completion tokens.

    Raises
    ------
    ModelError : the output head is missing or is not a plain linear layer.
    ObjectiveError : a completion that begins a row; nothing predicts its first token.
    """
    with _head_of_logprobs(model, input_ids, completion_mask):
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    values: torch.Tensor = output["logits"][..., 0]
    return values


def check_head(model: Any, input_ids: torch.Tensor) -> None:
    """Refuse a model whose logits are more than its output head times its last hidden states.

    Compares `policy_logprobs` with the model's own logits on input_ids [1, length]. Two passes without
    gradients, in evaluation mode (dropout would make them differ); the mode is put back. Raises ModelError.
    """
    everything = torch.ones_like(input_ids)
    after_first = everything.bool()
    after_first[:, 0] = False
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            ours = float(policy_logprobs(model, input_ids, everything, after_first).sum())
            logits = model(input_ids=input_ids, use_cache=False)["logits"][:, :-1].float()
    finally:
        for module in training:
            module.training = True
    theirs = float(logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).sum())
    if abs(ours - theirs) > 0.05 * input_ids.shape[1] + 0.01 * abs(theirs):
        raise ModelError(
            f"{type(causal_model(model)).__name__} scales its logits in a way that is not known here: "
            f"log-prob {ours:.3f} against its own {theirs:.3f} nats",
            remedy="use another model",
        )


def causal_model(model: Any) -> Any:
    """The model of transformers inside its wrappers: DDP and DeepSpeed (`.module`), then PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _head_of_logprobs(model: Any, input_ids: torch.Tensor, completion_mask: torch.Tensor) -> Iterator[None]:
    """Let the head give log-probs [rows, length, 1], and nothing scale them on their way out."""
    inner = causal_model(model)
    head = _plain_head(inner)
    scale, softcap, settings = _logit_scaling(inner)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        chunk = _CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else CHUNK_TOKENS
        values = completion_token_logprobs(
            hidden, head.weight, input_ids, completion_mask, head.bias, chunk, scale, softcap
        )
        return values.unsqueeze(-1).clone()  # FSDP2 hangs its hook on the output, which must not be a view

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
    if not isinstance(head, nn.Linear):
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


def _logit_scaling(inner: Any) -> tuple[float, float | None, list[tuple[Any, str, float | None]]]:
    """What the model does to its logits after the head: factor, softcap, and the settings to make neutral.

    Logits z become c tanh(scale z / c). Known: `logit_scale` of the model (Cohere: times),
    `logits_scaling` (Granite: divided by) and `final_logit_softcapping` (Gemma) of the config. What is not
    known is found by `check_head`.
    """
    config = inner.config.get_text_config()
    scale: float = 1.0
    settings: list[tuple[Any, str, float | None]] = []
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
