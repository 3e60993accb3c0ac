"""Sampling noise from a sample's own seed, and how it picks a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

#: Tokens whose probabilities are added before the running sum is taken (see `_pick`).
_BLOCK = 256
#: Most probable tokens that are sorted first; a row whose top_p mass they do not hold is sorted whole.
_HEAD = 1024


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The first `count` numbers in [0, 1) of a sample; number t decides token t.

    A function of (seed, t) alone: raw words of the counter-based Philox generator, whose stream numpy keeps
    stable, so asking for more numbers changes none of the first.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def draw(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inverting the cumulative distribution at the row's number.

    Parameters
    ----------
    logits : [rows, vocab], any float dtype; computed with in float32.
    noise : [rows] float64 in [0, 1).
    top_p : the token comes from the smallest set of most probable tokens that holds this mass.

    Returns
    -------
    (tokens [rows] int64, their log-probs [rows] float64 in nats at temperature 1 and top_p 1). A row's
    result depends on that row alone, bit for bit.
    """
    import torch

    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = shifted.exp()
    log_total = weights.sum(dim=-1, dtype=torch.float64).log()
    if temperature != 1.0:
        weights = (shifted / temperature).exp()
    tokens = _pick(weights, noise) if top_p >= 1.0 else _pick_nucleus(weights, noise, top_p)
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(-1).double() - log_total
    return tokens, logprobs


def _pick(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index i with probability weights[i] / sum(weights), sums in float64.

    In float32 a running sum over 10^5 tokens loses every probability below 6e-8. Sums of blocks come first,
    then the running sum inside one block: the result of one long running sum at a fraction of its cost.
    """
    import torch

    rows, vocab = weights.shape
    if vocab % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - vocab % _BLOCK))
    blocks = weights.view(rows, -1, _BLOCK)
    mass = blocks.sum(dim=-1, dtype=torch.float64)
    block, rest = _locate(mass, noise, scale=True)
    inside = blocks[torch.arange(rows, device=weights.device), block].double()
    place, _ = _locate(inside, rest, scale=False)
    return (block * _BLOCK + place).clamp(max=vocab - 1)


def _locate(mass: torch.Tensor, target: torch.Tensor, *, scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry in which the running sum of mass [rows, n] passes target [rows], and what is left in it.

    scale : the target is a share of the row's sum. Rounding never leads past the last entry with mass.
    """
    import torch

    running = mass.cumsum(dim=-1)
    total = running[:, -1]
    wanted = torch.minimum(
        target * total if scale else target, torch.nextafter(total, torch.zeros_like(total))
    )
    place = torch.searchsorted(running, wanted[:, None].clamp(min=0.0), right=True).squeeze(-1)
    place = place.clamp(max=mass.shape[-1] - 1)  # NaN passes every sum: any token, log-prob NaN
    before = running.gather(-1, place[:, None]).squeeze(-1) - mass.gather(-1, place[:, None]).squeeze(-1)
    return place, wanted - before


def _pick_nucleus(weights: torch.Tensor, noise: torch.Tensor, top_p: float) -> torch.Tensor:
    """`_pick` among the most probable tokens of mass top_p.

    Which rows are sorted whole is decided row by row, so no row changes another's order of equal weights.
    """
    import torch

    total = weights.sum(dim=-1, dtype=torch.float64)
    best, order = weights.topk(min(_HEAD, weights.shape[-1]), dim=-1)
    enough = best.sum(dim=-1, dtype=torch.float64) >= top_p * total
    tokens = torch.empty_like(order[:, 0])
    if enough.any():
        tokens[enough] = _pick_sorted(best[enough], order[enough], total[enough], noise[enough], top_p)
    if not enough.all():
        best, order = weights[~enough].sort(dim=-1, descending=True, stable=True)
        tokens[~enough] = _pick_sorted(best, order, total[~enough], noise[~enough], top_p)
    return tokens


def _pick_sorted(
    best: torch.Tensor, order: torch.Tensor, total: torch.Tensor, noise: torch.Tensor, top_p: float
) -> torch.Tensor:
    mass = best.double()
    before = mass.cumsum(dim=-1) - mass
    # A token is kept while the mass before it has not reached top_p, so the first is always kept.
    mass = mass.masked_fill(before >= top_p * total[:, None], 0.0)
    place, _ = _locate(mass, noise, scale=True)
    return order.gather(-1, place[:, None]).squeeze(-1)
