"""AdamW for bfloat16 weights whose float32 values (masters) it keeps: 2 bytes a weight beside the moments.

A step takes the same float32 operations as torch.optim.AdamW on the masters, with the same gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qrpo_core.models.split_weights import join_float32, split_into

#: Weights that are in float32 at a time.
_CHUNK = 1 << 24
#: Rows are taken in multiples of this: a CPU rounds the values after its last whole vector in another way.
_ALIGNED = 16


class MasterAdamW(torch.optim.Optimizer):
    """AdamW with float32 masters and moments for bfloat16 weights of any shape [..., columns].

    params : parameters or groups. low_bits : what each bfloat16 one lacks (`models.split_weights`); others
        are float32. lr, betas, eps, weight_decay : as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        low_bits: Mapping[torch.nn.Parameter, Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            }
            if parameter in low_bits:
                self.state[parameter]["low_bits"] = low_bits[parameter]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients. closure : not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group)

    def _update(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        columns = parameter.shape[-1] if parameter.dim() else 1
        parts = [parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        if "low_bits" in state:
            parts.append(state["low_bits"])
        rows = [part.reshape(-1, columns) for part in parts if part is not None]
        chunk = _ALIGNED * max(1, _CHUNK // columns // _ALIGNED)
        for start in range(0, len(rows[0]), chunk):
            weight, gradient, mean, square, *rest = (part[start : start + chunk] for part in rows)
            low = rest[0] if rest else None
            master = weight if low is None else join_float32(weight, low, start)
            step = state["step"].clone()  # each chunk counts it up
            _adamw(master, gradient.float(), mean, square, step, group)
            if low is not None:
                split_into(master, weight, low, start)
        state["step"] += 1

    def restore(self) -> None:
        """Make every parameter float32, with its exact value. The optimiser has no state afterwards."""
        for parameter in self._parameters():
            low = self.state.pop(parameter).get("low_bits")
            parameter.grad = None
            if low is not None:
                parameter.data = join_float32(parameter.data, low)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. torch casts what it loads to the parameters' dtype, which would round moments."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for parameter, place in zip(self._parameters(), places, strict=True):
            saved = state_dict["state"][place]
            self.state[parameter] = {name: value.to(parameter.device) for name, value in saved.items()}

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _adamw(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """torch's own update of one float32 tensor, in place."""
    adamw(
        [weight],
        [gradient],
        [mean],
        [square],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
