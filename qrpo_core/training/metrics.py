"""The metrics that are logged beside the loss (docs/reference/metrics.md).

Means are over the items (examples, or pairs) of all steps since the last entry, over all processes. A pair
counts with the mean of its two rows where a number belongs to a row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qrpo_core.objective_kinds import Batch, Objective

#: Sums that are not logged themselves: items, tokens of their rows, tokens that the model read for them.
_ITEMS, _TOKENS, _COMPUTED = "items", "tokens", "computed"
#: Items whose target is finite, where it can be -inf, and the metrics whose mean is over those.
_FINITE = "finite"
_OF_FINITE = ("target", "log_ratio_target", "log_ratio_error")


def item_metrics(
    objective: Objective, policy_logprob: Tensor, batch: Batch, *, with_reference: bool
) -> dict[str, Tensor]:
    """The metrics of each item, [items], by name.

    policy_logprob : [rows] float64, detached. with_reference : whether ref_logprob is known.
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
    rows |= objective.metrics(policy_logprob, batch)
    found = {name: values.view(len(batch["weight"]), -1).mean(1) for name, values in rows.items()}
    if objective.pairwise:
        compared = objective.compared(policy_logprob, batch)
        margin = compared[0::2] - compared[1::2]
        found["accuracy"] = (margin > 0).double()
        found["margin"] = margin
    if objective.zero_density:
        finite = found["target"].isfinite()
        found |= {name: torch.where(finite, found[name], 0.0) for name in _OF_FINITE}
        found[_FINITE] = finite.double()
    return found


class MetricSums:
    """Sums of the metrics of all microbatches, on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], batch: Batch) -> None:
        """Add a microbatch. values : [items] by name. An item of weight 0 counts nowhere."""
        weight = batch["weight"]
        tokens = batch["tokens"].view(len(weight), -1).sum(1)
        sums = {name: torch.where(weight > 0, value.double(), 0.0).sum() for name, value in values.items()}
        sums |= {_ITEMS: weight.sum(), _TOKENS: (tokens * weight).sum()}
        sums[_COMPUTED] = batch["computed"] * weight.amax()
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, numbers: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> Means:
        """The means over all processes since the last call, and those of `numbers` [] beside them.

        gather : one process's [n] to [processes * n] (`Accelerator.gather`); every process must call.
        """
        sums, self._sums = self._sums, {}
        since, self._since = self._since, time.perf_counter()
        seconds = 0.0 if since is None else self._since - since
        device = next(iter(numbers.values())).device
        host = [
            torch.full((), value, dtype=torch.float64, device=device)
            for value in (seconds, peak_memory_bytes(device))
        ]
        vector = torch.stack([value.double() for value in (*host, *numbers.values(), *sums.values())])
        return Means(list(numbers), list(sums), gather(vector).view(-1, len(vector)))


class Means:
    """Means on their way from the device; `read` waits for them.

    numbers, sums : the names of the columns behind seconds and peak bytes. table : [processes, columns].
    """

    def __init__(self, numbers: list[str], sums: list[str], table: Tensor) -> None:
        self._numbers, self._names = numbers, sums
        self._there: torch.cuda.Event | None = None
        if table.device.type == "cuda":
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record()
        else:
            self._table = table

    def read(self) -> dict[str, float]:
        """The means by name."""
        if self._there is not None:
            self._there.synchronize()
        seconds, peak = self._table[:, :2].amax(0).tolist()
        count = len(self._numbers)
        found = dict(zip(self._numbers, self._table[:, 2 : 2 + count].mean(0).tolist(), strict=True))
        total = dict(zip(self._names, self._table[:, 2 + count :].sum(0).tolist(), strict=True))
        if not total:
            return found
        items, tokens, computed = (total.pop(name) for name in (_ITEMS, _TOKENS, _COMPUTED))
        finite = total.pop(_FINITE, items)
        counts = {name: finite if name in _OF_FINITE else items for name in total}
        means = {name: value / counts[name] for name, value in total.items() if counts[name]}
        return (
            found
            | means
            | {
                "tokens_per_second": tokens / seconds if seconds else 0.0,
                "shared_prefix_share": 1 - computed / tokens,
                "peak_memory_gb": peak / 1e9,
            }
        )


def peak_memory_bytes(device: torch.device) -> float:
    """The peak of CUDA's allocator; on other devices the peak resident size of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(size if sys.platform == "darwin" else 1024 * size)  # macOS counts bytes, Linux KiB
