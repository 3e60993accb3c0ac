"""Completion log-probabilities of a causal language model, without materialising its logits.

Reference log-probs and the trained policy's come from the same function and from packed rows. On a CPU a
row's company does not change its log-prob there, so that both are equal at the first step.

During a call we replace the output head's `forward`. Ours takes the hidden states and returns the log-prob of
each completion token in place of logits. So the head's weight is read inside the head's call, the only place
where FSDP2 and DeepSpeed's ZeRO-3 gather it, and the log-probs are part of the model's output, whose hooks
DDP, FSDP2 and ZeRO-3 use in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from qrpo_core.common.errors import ModelError
from qrpo_core.data.packing import PackedRow, pack
from qrpo_core.models.heap import give_back_free_memory
from qrpo_core.models.microbatches import is_out_of_memory
from qrpo_core.models.packed_attention import packed_mask, use_packed_attention
from qrpo_core.objective.logprobs import label_logprobs

#: Tokens of a sequence on which `check_head` looks at the logits, at most.
CHECKED_TOKENS = 64

#: Roundings of the largest logit that two ways of scaling, capping and normalising logits may differ by.
_ROUNDINGS = 32

#: (owner, name, the value with which it changes no logits) of what a model does to its logits.
_Settings: TypeAlias = list[tuple[Any, str, float | None]]


def policy_logprobs(model: Any, packed: PackedRow, temperature: float = 1.0) -> torch.Tensor:
    """log pi(completion | prompt) in nats, float64 [rows]: the sum of `token_logprobs`."""
    return completion_logprobs(token_logprobs(model, packed, temperature))


def completion_logprobs(tokens: torch.Tensor) -> torch.Tensor:
    """The sums of log-probs [rows, longest completion] in float64 [rows].

    A float32 sum would depend on the order of adding, and so on the longest completion beside a row.
    """
    return tokens.sum(dim=1, dtype=torch.float64)


def token_logprobs(model: Any, packed: PackedRow, temperature: float = 1.0) -> torch.Tensor:
    """log pi(token | preceding tokens) in nats, float32 [rows, longest completion], 0 behind a completion.

    The model keeps the attention of packed rows afterwards, because activation checkpointing runs layers
    again in the backward pass; forwards without packed rows are as before.

    Parameters
    ----------
    model : a causal language model of transformers, as it is or wrapped (DDP, FSDP2, DeepSpeed, PEFT).
    packed : the rows, on the model's device.
    temperature : pi is softmax(logits / temperature).

    Raises
    ------
    ModelError : the output head is missing or is not a plain linear layer; layers attend in an unknown way.
    """
    inner = causal_model(model)
    head = _plain_head(inner)
    scale, softcap, settings = _logit_scaling(inner)

    def logprobs(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.requires_grad and hidden.device.type == "cpu":
            give_back_free_memory()  # all activations are there, and the head adds what it needs
        values = label_logprobs(
            hidden[0].index_select(0, packed.sources),
            head.weight,
            packed.labels,
            head.bias,
            logit_scale=scale,
            logit_softcap=softcap,
            temperature=temperature,
        )
        return values[None, :, None].clone()  # FSDP2 puts a hook on the output, which must not be a view

    values = _run(model, packed, head, logprobs, settings)[0, :, 0]
    rows, longest = packed.shape
    table = torch.zeros(rows * longest, dtype=values.dtype, device=values.device)
    return table.index_copy(0, packed.cells, values).view(rows, longest)


def check_head(model: Any, input_ids: torch.Tensor) -> None:
    """Raise ModelError if the model changes its head's logits in a way that `token_logprobs` does not know.

    It runs input_ids [1, length] twice, without gradients and in evaluation mode (dropout would make the runs
    differ), and restores the mode. In the first run the head returns float32 logits, and the model's output
    must match what `_logit_scaling` says, at every position and for every token; this shows unknown factors,
    caps and biases in any precision of the weights. In the second run the head returns log-probs, which must
    leave the model unchanged.
    """
    with checking(model):
        _compare_logits(model, input_ids)
        _compare_passed_on(model, input_ids)


@contextlib.contextmanager
def checking(model: Any) -> Iterator[None]:
    """A model without dropout, gradients and autocast, whose modules return to their mode.

    Raises ModelError where the model's own code fails, as a model does that takes no packed rows.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, ModelError) or is_out_of_memory(error):
            raise
        name = type(causal_model(model)).__name__
        raise ModelError(f"{name} cannot run packed rows: {error}", remedy="use another model") from error
    finally:
        for module in training:
            module.training = True


def _compare_logits(model: Any, input_ids: torch.Tensor) -> None:
    """Raise ModelError if the model makes other logits of its head's products than `_logit_scaling` says."""
    inner = causal_model(model)
    name, head = type(inner).__name__, _plain_head(inner)
    scale, softcap, _ = _logit_scaling(inner)
    products: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if head.bias is None else head.bias.float()
        products.append(torch.nn.functional.linear(hidden.float(), head.weight.float(), bias))
        return products[-1].clone()

    theirs = _run(model, _alone(input_ids), head, forward, [])
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
    # Both come from the same products and differ only by the rounding of a few operations.
    largest = torch.maximum(ours.abs().max(), expected.abs().max())
    if not difference <= _ROUNDINGS * torch.finfo(torch.float32).eps * largest:
        raise ModelError(
            f"{name} scales its logits in a way that is not known here: a token's log-prob differs by "
            f"{float(difference):.3g} nats",
            remedy="use another model",
        )


def _compare_passed_on(model: Any, input_ids: torch.Tensor) -> None:
    """Raise ModelError if the model changes log-probs that its head returns in place of logits."""
    inner = causal_model(model)
    given = torch.linspace(-40.0, -0.5, input_ids.shape[1], device=input_ids.device).view(1, -1, 1)
    settings = _logit_scaling(inner)[2]
    found = _run(model, _alone(input_ids), _plain_head(inner), lambda hidden: given.clone(), settings)
    if not torch.equal(found.float(), given):
        raise ModelError(
            f"{type(inner).__name__} changes log-probs that its output head gives", remedy="use another model"
        )


def _alone(input_ids: torch.Tensor) -> PackedRow:
    """A packed row of one sequence, input_ids [1, tokens]."""
    return pack([input_ids[0].tolist()], [[]]).to(input_ids.device)


def _run(
    model: Any,
    packed: PackedRow,
    head: nn.Linear,
    forward: Callable[[torch.Tensor], torch.Tensor],
    settings: _Settings,
) -> torch.Tensor:
    """The model's logits of a packed row when its head has another forward."""
    use_packed_attention(causal_model(model))
    with _replaced(head, forward, settings):
        output = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=packed_mask(packed.input_ids.device),
            segments=packed.segments,
            use_cache=False,
        )
    logits: torch.Tensor = output["logits"]
    return logits


def causal_model(model: Any) -> Any:
    """The transformers model inside its wrappers: DDP and DeepSpeed (`.module`), then PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _replaced(
    head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor], settings: _Settings
) -> Iterator[None]:
    """Replace the head's forward and set some settings to neutral values, then restore both."""
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
    """How the model changes its logits after the head: factor, softcap, and the settings to make neutral.

    Logits z become c tanh(scale z / c). Known: `logit_scale` of the model (Cohere: times),
    `logits_scaling` (Granite: divided by) and `final_logit_softcapping` (Gemma) of the config. `check_head`
    finds others.
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
