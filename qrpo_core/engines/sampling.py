"""Random numbers from a sample's seed, and the tokens that they draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

#: Tokens in a block of the two-level cumulative sum (see `_pick`).
_BLOCK = 256
#: Most probable tokens to sort first; a row that needs more of them for top_p is sorted whole.
_HEAD = 1024


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The first `count` random numbers in [0, 1) of a sample; number t draws token t.

    They come from the raw words of the counter-based Philox generator, whose stream numpy keeps stable, so
    number t is a function of (seed, t) alone.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def draw_tokens(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, where the row's cumulative distribution passes the row's random number.

    Parameters
    ----------
    logits : [rows, vocab], any float dtype; converted to float32.
    noise : [rows] float64 in [0, 1).
    top_p : tokens come from the smallest set of most probable tokens that holds this mass.

    Returns
    -------
    (tokens [rows] int64, their log-probs [rows] float64 in nats at temperature 1 and top_p 1). A row's
    result depends on that row alone, bit for bit.
    """
    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = shifted.exp()
    log_total = _sums(_blocks(weights)).sum(dim=-1).log()
    if temperature != 1.0:
        weights = (shifted / temperature).exp()
    tokens = _pick(weights, noise) if top_p >= 1.0 else _pick_nucleus(weights, noise, top_p)
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(-1).double() - log_total
    return tokens, logprobs


def pick_tokens(logits: torch.Tensor, noise: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The tokens [rows] of `draw_tokens` without their log-probs, for half of the time."""
    weights = (logits.float() if temperature == 1.0 else logits.float() / temperature).softmax(dim=-1)
    return _pick(weights, noise) if top_p >= 1.0 else _pick_nucleus(weights, noise, top_p)


def _pick(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Index i with probability weights[i] / sum(weights), cumulative sums in float64.

    A float32 cumulative sum over 10^5 tokens would lose every probability below 6e-8. Summing blocks first,
    then inside one block, costs a fraction of one long float64 sum.
    """
    import torch

    rows, vocab = weights.shape
    blocks = _blocks(weights)
    block, rest = _locate(_sums(blocks), noise)
    inside = blocks[torch.arange(rows, device=weights.device), block].double()
    place, _ = _locate(inside, rest)
    return (block * _BLOCK + place).clamp(max=vocab - 1)


def _blocks(weights: torch.Tensor) -> torch.Tensor:
    """Weights [rows, vocab] as [rows, blocks, _BLOCK], zeros at the end."""
    import torch

    rows, vocab = weights.shape
    if vocab % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, _BLOCK - vocab % _BLOCK))
    return weights.view(rows, -1, _BLOCK)


def _sums(blocks: torch.Tensor) -> torch.Tensor:
    """Each block's sum as float64, [rows, blocks]. It is rounded to float32, by 1e-7 of itself: a float64 sum
    would copy all weights and take 20 times as long."""
    return blocks.sum(dim=-1).double()


def _locate(mass: torch.Tensor, fraction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry where the cumulative sum of mass [rows, n] passes a fraction [rows] of the row's sum.

    Also returns how far into that entry this is, as a fraction of the entry. Rounding never selects an entry
    without mass.
    """
    import torch

    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1]
    wanted = torch.minimum(fraction * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, wanted[:, None].clamp(min=0.0), right=True).squeeze(-1)
    place = place.clamp(max=mass.shape[-1] - 1)  # NaN selects any token; its log-prob is NaN
    entry = mass.gather(-1, place[:, None]).squeeze(-1)
    before = cumulative.gather(-1, place[:, None]).squeeze(-1) - entry
    return place, (wanted - before) / entry


def _pick_nucleus(weights: torch.Tensor, noise: torch.Tensor, top_p: float) -> torch.Tensor:
    """`_pick` among the most probable tokens of mass top_p.

    Each row decides by itself whether it is sorted whole, so rows do not change each other's order of ties.
    On accelerators all are: to look at which need it would stop the device at every token.
    """
    import torch

    total = weights.sum(dim=-1, dtype=torch.float64)
    if weights.device.type != "cpu":
        best, order = weights.sort(dim=-1, descending=True, stable=True)
        return _pick_sorted(best, order, total, noise, top_p)
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
    # A token is kept while the mass before it is below top_p, so the first is always kept.
    mass = mass.masked_fill(before >= top_p * total[:, None], 0.0)
    place, _ = _locate(mass, noise)
    return order.gather(-1, place[:, None]).squeeze(-1)
