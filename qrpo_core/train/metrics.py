"""What is logged beside the loss: one name each, documented in docs/metrics.md.

Means are over the items (examples, or pairs) of all steps since the last entry, over all processes. A pair
counts with the mean of its two rows where a number belongs to a row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qrpo_core.train.objectives import Batch, TrainingObjective

#: Sums that are not logged themselves: items, their tokens, and the same with padding.
_ITEMS, _TOKENS, _CELLS = "items", "tokens", "cells"


def measures(
    objective: TrainingObjective, policy_logprob: Tensor, batch: Batch, *, with_reference: bool
) -> dict[str, Tensor]:
    """The numbers of each item, [items], by name.

    policy_logprob : [rows] float64, detached. with_reference : whether ref_logprob means anything.
    """
    rows: dict[str, Tensor] = {"completion_tokens": batch["length"]}
    log_ratio = policy_logprob - batch["ref_logprob"]
    if with_reference:
        rows["log_ratio"] = log_ratio
        rows["log_ratio_per_token"] = log_ratio / batch["length"]
        rows["implicit_reward"] = objective.betas(batch) * log_ratio
        # Schulman's k3: for y ~ pi_ref its mean is 1 - 1 + KL(pi_ref || pi), and no term is negative.
        rows["kl"] = torch.expm1(log_ratio) - log_ratio
    if objective.has_target:
        target = batch["target"] / batch["beta"]
        rows["target"] = batch["target"]
        rows["log_ratio_target"] = target
        rows["log_ratio_error"] = (target - log_ratio).abs()
        rows["positive_targets"] = (target > 0).double()
        rows["sign_agreement"] = (torch.sign(log_ratio) == torch.sign(target)).double()
    found = {name: values.view(len(batch["weight"]), -1).mean(1) for name, values in rows.items()}
    if objective.pairwise:
        score = objective.score(policy_logprob, batch)
        margin = score[0::2] - score[1::2]
        found["accuracy"] = (margin > 0).double()
        found["margin"] = margin
    return found


class MetricSums:
    """Adds up what every pass measures, on the device, and gives the means when an entry is due."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._since: float | None = None

    def __len__(self) -> int:
        """How many numbers have been added up since the last entry."""
        return len(self._sums)

    def start(self) -> None:
        """Begin the clock, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], batch: Batch) -> None:
        """Count a pass. values : [items] by name. An item of weight 0 counts as padding."""
        weight, mask = batch["weight"], batch["attention_mask"]
        tokens = mask.sum(1).view(len(weight), -1).sum(1)
        sums = {name: torch.where(weight > 0, value.double(), 0.0).sum() for name, value in values.items()}
        sums |= {_ITEMS: weight.sum(), _TOKENS: (tokens * weight).sum()}
        sums[_CELLS] = weight.new_tensor(mask.numel())
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all processes since the last call.

        gather : one process's [n] to [processes * n] (`Accelerator.gather`); every process must call.
        """
        sums, self._sums = self._sums, {}
        since, self._since = self._since, time.perf_counter()
        seconds = 0.0 if since is None else self._since - since
        some = sums[_ITEMS]
        own = some.new_tensor([seconds, peak_memory_bytes(some.device)])
        vector = torch.cat([own, torch.stack(list(sums.values()))])
        table = gather(vector).view(-1, len(vector)).cpu()
        seconds, peak = table[:, :2].amax(0).tolist()
        total = dict(zip(sums, table[:, 2:].sum(0).tolist(), strict=True))
        items, tokens, cells = (total.pop(name) for name in (_ITEMS, _TOKENS, _CELLS))
        return {name: value / items for name, value in total.items()} | {
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "padding_share": 1 - tokens / cells,
            "peak_memory_gb": peak / 1e9,
        }


def peak_memory_bytes(device: torch.device) -> float:
    """The most that CUDA's allocator held so far; elsewhere the largest resident size of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(size if sys.platform == "darwin" else 1024 * size)  # macOS counts bytes, Linux KiB
