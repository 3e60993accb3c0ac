"""Functions in the accuracy needed here: 1e-12 relative for beta from 1e-5 to 1e3."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qrpo_core.objective.checks import FloatArray

SERIES_LIMIT = 60.0
"""Up to here the power series of `log_kummer` is summed directly (exp(60) = 1e26 is far from overflow)."""


def log_kummer(a: float, u: FloatArray) -> FloatArray:
    """log 1F1(a; a + 1; u) = log of the integral over (0, 1) of exp(u t^(1/a)), for a > 0 and u > 0.

    Three ways to the same number, each without cancellation where it is used:

    - u <= 60: the power series sum_k u^k/k! * a/(a+k); every term is positive, and log1p keeps the relative
      accuracy where log Z itself is small (large beta).
    - u >= max(60, 4a): the asymptotic series exp(u) * (a/u) * sum_k (1-a)(2-a)...(k-a)/u^k (DLMF 13.7.2); the
      term that it leaves out is smaller by exp(-u), below 1e-26.
    - between (a > 15, that is a transform t^p with p < 1/15): exp(u) E[a/(a+K)], K ~ Poisson(u).
    """
    u = np.asarray(u, dtype=np.float64)
    out = np.empty_like(u)
    small = u <= SERIES_LIMIT
    large = u >= max(SERIES_LIMIT, 4 * a)
    large &= ~small
    between = ~(small | large)
    if small.any():
        out[small] = np.log1p(_kummer_series_minus_one(a, u[small]))
    if large.any():
        out[large] = u[large] + np.log(a / u[large]) + np.log1p(_kummer_tail(a, u[large]))
    if between.any():
        out[between] = [_log_kummer_poisson(a, value) for value in u[between].tolist()]
    return out


def _kummer_series_minus_one(a: float, u: FloatArray) -> FloatArray:
    """sum over k >= 1 of u^k/k! * a/(a+k)."""
    top = float(u.max())
    terms = int(top + 10 * math.sqrt(top) + 25)  # Poisson tail beyond ten deviations: below 1e-20
    power = np.ones_like(u)
    total = np.zeros_like(u)
    for k in range(1, terms + 1):
        power = power * (u / k)
        total += power * (a / (a + k))
    return total


def _kummer_tail(a: float, u: FloatArray) -> FloatArray:
    """sum over k >= 1 of (1-a)(2-a)...(k-a) / u^k; at u >= max(60, 4a) 59 terms are more than enough."""
    term = np.ones_like(u)
    total = np.zeros_like(u)
    for k in range(1, int(SERIES_LIMIT)):
        term = term * ((k - a) / u)
        total += term
        if np.abs(term).max() < 1e-18:
            break
    return total


def _log_kummer_poisson(a: float, u: float) -> float:
    """u + log E[a/(a+K)], K ~ Poisson(u), over the mode and fourteen deviations to either side."""
    mode = int(u)
    half = int(14 * math.sqrt(u)) + 40
    above = np.cumprod(u / np.arange(mode + 1.0, mode + 1.0 + half))
    low = max(0, mode - half)
    below = np.cumprod(np.arange(mode, low, -1.0) / u)
    weight = np.concatenate([below[::-1], [1.0], above])
    k = np.arange(low, mode + half + 1.0)
    return u + math.log(float((weight * (a / (a + k))).sum() / weight.sum()))


def log_mean_exp(values: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Over the last axis, log mean exp(values/beta) in two parts: (max value, the rest in nats).

    values [..., n] and beta [...]; the result is max/beta + rest. The parts are kept apart because a target
    is f - max - beta*rest: with all values equal rest is exactly 0, and so is the target (method.md section
    3.4).
    """
    top = values.max(axis=-1)
    scaled = (values - top[..., None]) / np.asarray(beta)[..., None]
    # expm1/log1p instead of exp/log: at beta = 1e3 log Z is 5e-4 and exp would round it to 13 digits.
    return top, np.log1p(np.expm1(scaled).mean(axis=-1))


def uniform_from_seed(seeds: NDArray[np.uint64]) -> FloatArray:
    """A number in the open interval (0, 1) for each 64-bit seed: the finaliser of splitmix64.

    Equal seeds give equal numbers on every machine; that is all the "randomized" convention needs, and it
    keeps rank randomisation free of any generator state.
    """
    mixed = np.atleast_1d(np.asarray(seeds)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    # 52 bits and a half step: neither 0 nor 1 can come out.
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
