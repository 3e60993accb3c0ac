"""Completion log-probabilities of a causal language model, without its logits.

One function for both sides of the log-ratio: the stored reference log-probs and the trained policy's, so
that at the first step they differ by nothing but padding.
"""

from __future__ import annotations

from typing import Any

import torch

from qrpo_core.errors import ModelError
from qrpo_core.objective.logprobs import completion_logprobs


def policy_logprobs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """log pi(completion | prompt) in nats, float32 [batch].

    model : a causal language model of transformers, wrapped (DDP, PEFT) or not; it is called through its
        own forward, so wrappers see the pass. Its head is asked for one position only; the completion
        positions go through the head in pieces (`completion_logprobs`).
    completion_mask : [batch, length], true at the completion tokens.
    """
    inner = getattr(model, "module", model)
    captured: list[torch.Tensor] = []
    decoder, head = inner.get_decoder(), inner.get_output_embeddings()
    if decoder is None or head is None:
        raise ModelError(f"{type(inner).__name__} has no decoder or no output head")
    hook = decoder.register_forward_hook(lambda _module, _args, output: captured.append(output[0]))
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return completion_logprobs(
        captured[0],
        head.weight,
        input_ids,
        completion_mask,
        lm_head_bias=getattr(head, "bias", None),
        logit_scale=float(getattr(inner.config, "logit_scale", None) or 1.0),
        logit_softcap=getattr(inner.config, "final_logit_softcapping", None),
    )
