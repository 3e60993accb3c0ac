"""log of the mean of exp(u f(t)) over a stretch of quantiles [low, high], in nats, u = 1/beta.

The population's log Z is the stretch [0, 1]; the tie-aware normaliser needs the others
(docs/reference/method.md, section 3.7). A difference of two population integrals would lose about
log10(1/(high - low)) digits, and exp(u) overflows: each form here keeps its relative accuracy for a short
stretch and for beta from 1e-5 to 1e3. All arguments broadcast; 0 <= low < high <= 1.
"""

from __future__ import annotations

import numpy as np

from qrpo_core.objective.checks import FloatArray

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)  # on [-1, 1]
_LOG_EXPM1_RATIO = ((1, 1 / 2), (2, 1 / 24), (4, -1 / 2880), (6, 1 / 181440), (8, -1 / 9676800))
"""log(expm1(y)/y) as a series: power and coefficient."""
_FAR = 50.0  # nats: exp(-50) is below the precision of float64
_CHUNK = 1 << 16  # stretches in work at a time


def identity_log_mean(low: FloatArray, high: FloatArray, u: FloatArray) -> FloatArray:
    """f(t) = t: u low + log((exp(u w) - 1)/(u w)), w = high - low."""
    v = u * (high - low)
    # exp(v) overflows float64 above 709: take v out of the logarithm. Up to v = 1 the series keeps the
    # relative accuracy that log(expm1(v)/v) loses as it tends to 0.
    large = np.maximum(v, 1.0)
    whole = np.where(
        v > 1.0, large - np.log(large) + np.log1p(-np.exp(-large)), _power_series(1.0, np.minimum(v, 1.0))
    )
    return np.asarray(u * low + whole, dtype=np.float64)


def log_log_mean(low: FloatArray, high: FloatArray, u: FloatArray) -> FloatArray:
    """f(t) = log t: the mean of t^u is (high^(u+1) - low^(u+1))/((u + 1)(high - low))."""
    with np.errstate(divide="ignore"):
        x = np.log1p(-(high - low) / high)  # log(low/high), exact for a short stretch
    inside = np.where(np.isinf(x), -1.0, x)
    y = (1.0 + u) * inside
    rest = np.log(np.expm1(y) / y) - np.log(np.expm1(inside) / inside)
    # The difference as a series in x: it keeps its digits where both logarithms are near 0.
    short = np.where(y > -0.25, inside, 0.0)
    growth = np.log1p(u)
    series = sum(c * np.expm1(k * growth) * short**k for k, c in _LOG_EXPM1_RATIO)
    rest = np.where(np.isinf(x), -growth, np.where(short < 0.0, series, rest))
    return np.asarray(u * np.log(high) + rest, dtype=np.float64)


def power_log_mean(exponent: float, low: FloatArray, high: FloatArray, u: FloatArray) -> FloatArray:
    """f(t) = t^exponent: a closed form from 0 on, else Gauss-Legendre quadrature in log t."""
    low, high, u = np.broadcast_arrays(low, high, u)
    scale = u * high**exponent
    out = np.empty(scale.shape)
    whole = low == 0.0
    out[whole] = _power_whole(exponent, scale[whole])
    if not whole.all():
        part = np.flatnonzero(~whole.ravel())
        ratio = np.log1p(-((high - low) / high).ravel()[part])  # log(low/high)
        values = [
            _power_part(exponent, scale.ravel()[part[rows]], -ratio[rows])
            for rows in np.array_split(np.arange(len(part)), -(-len(part) // _CHUNK))
        ]
        out[~whole] = np.concatenate(values)
    return out


def _power_whole(exponent: float, u: FloatArray) -> FloatArray:
    """log 1F1(a; a + 1; u) with a = 1/exponent: the mean over [0, 1]."""
    a = 1.0 / exponent
    out = _power_series(a, np.minimum(u, 1.0))
    if (u > 1.0).any():
        from scipy.special import hyp1f1

        # Kummer's transformation, 1F1(a; a + 1; u) = exp(u) 1F1(1; a + 1; -u), does not overflow.
        out = np.where(u > 1.0, u + np.log(hyp1f1(1.0, a + 1.0, -u)), out)
    return out


def _power_series(a: float, u: FloatArray) -> FloatArray:
    """log 1F1(a; a + 1; u) for 0 <= u <= 1, as log1p of sum over k >= 1 of u^k/k! * a/(a + k)."""
    term, total = np.ones_like(u), np.zeros_like(u)
    for k in range(1, 20):  # 1/20! is below the precision of float64
        term = term * (u / k)
        total = total + term * (a / (a + k))
    return np.asarray(np.log1p(total), dtype=np.float64)


def _power_part(exponent: float, s: FloatArray, length: FloatArray) -> FloatArray:
    """log of the mean of exp(s (t/high)^exponent) over [low, high]; length = log(high/low), [stretches].

    With t = high exp(-y) it is an integral of a smooth function over y in [0, length]. Its panels double
    in width from the scale on which the integrand changes, and end where it is negligible.
    """
    small = s <= 1.0
    first = np.minimum(4.0 / (exponent * np.maximum(s, 1.0)), 4.0)
    bounded = s * np.expm1(-exponent * length) > -_FAR
    with np.errstate(divide="ignore", invalid="ignore"):
        end = np.where(bounded, length, -np.log1p(-_FAR / s) / exponent)
    total, left, right = np.zeros_like(s), np.zeros_like(s), np.minimum(first, end)
    while (left < end).any():
        half = 0.5 * (right - left)
        y = left[:, None] + half[:, None] * (1.0 + _NODES)
        fall = s[:, None] * np.expm1(-exponent * y)
        # For small s the mean of expm1(u f), which keeps its digits as it tends to 0.
        values = np.where(small[:, None], np.expm1(fall + np.minimum(s, 1.0)[:, None]), np.exp(fall))
        total += half * ((values * np.exp(-y)) @ _WEIGHTS)
        left, right = right, np.minimum(2.0 * right, end)
    mean = total / -np.expm1(-length)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(small, np.log1p(mean), s + np.log(mean)), dtype=np.float64)


def normal_log_mean(low: FloatArray, high: FloatArray, u: FloatArray) -> FloatArray:
    """f(t) = Phi^-1(t): u^2/2 + log of (Phi(z_high - u) - Phi(z_low - u))/(high - low), z = Phi^-1."""
    from scipy.special import ndtri

    low, high, u = np.broadcast_arrays(low, high, u)
    whole = (low == 0.0) & (high == 1.0)
    out = 0.5 * u * u
    if whole.all():
        return np.asarray(out, dtype=np.float64)
    out = np.array(out)
    width, bottom, top, at = (x[~whole] for x in np.broadcast_arrays(high - low, ndtri(low), ndtri(high), u))
    near = at <= 0.5
    values = np.empty_like(at)
    values[near] = _normal_series(bottom[near], top[near], width[near], at[near])
    values[~near] = _normal_tails(bottom[~near], top[~near], width[~near], at[~near])
    out[~whole] = values
    return out


def _normal_series(bottom: FloatArray, top: FloatArray, width: FloatArray, u: FloatArray) -> FloatArray:
    """log1p of sum over k >= 1 of u^k/k! times the k-th moment of a normal variable in [bottom, top]."""
    ends = np.where(np.isinf(bottom), 0.0, bottom), np.where(np.isinf(top), 0.0, top)
    edge = [np.exp(-0.5 * z * z) / np.sqrt(2.0 * np.pi) for z in (bottom, top)]  # z^(k-1) phi(z)
    moments = [width, edge[0] - edge[1]]
    factor, total = u, u * moments[1]
    for k in range(2, 30):
        edge = [value * z for value, z in zip(edge, ends, strict=True)]
        moments.append((k - 1) * moments[-2] + edge[0] - edge[1])
        factor = factor * u / k
        total = total + factor * moments[-1]
    return np.asarray(np.log1p(total / width), dtype=np.float64)


def _normal_tails(bottom: FloatArray, top: FloatArray, width: FloatArray, u: FloatArray) -> FloatArray:
    """The closed form for u > 1/2; left of u by scaled tails, which do not underflow."""
    from scipy.special import erfcx, ndtr

    left = top <= u
    # Each form is computed everywhere and read only on its own side of u.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lower, upper = (0.5 * erfcx((u - z) / np.sqrt(2.0)) for z in (bottom, top))
        # u z - z^2/2 at both ends: the exponent of exp(u z) phi(z), up to its constant
        fall = -(top - bottom) * (u - 0.5 * (top + bottom))
        scaled = top * (u - 0.5 * top) + np.log(
            upper - np.where(np.isinf(bottom), 0.0, lower * np.exp(np.where(np.isinf(bottom), 0.0, fall)))
        )
        right = bottom > u
        direct = np.where(right, ndtr(u - bottom) - ndtr(u - top), ndtr(top - u) - ndtr(bottom - u))
        plain = 0.5 * u * u + np.log(direct)
    return np.asarray(np.where(left, scaled, plain) - np.log(width), dtype=np.float64)
