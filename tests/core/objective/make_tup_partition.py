"""Write tup_partition.json: log of the mean of (l/(1 - l))^(1/beta) over [low, high], l = max(t - lambda, 0).

50-digit arithmetic by two roads, which must agree: quadrature in the log odds, and from 0 on the closed form
z^(1+u) lambda^(1-u) 2F1(1, 2; 2+u; z)/(1+u), u = 1/beta, z = 1 - lambda.

    python tests/core/objective/make_tup_partition.py
"""

from __future__ import annotations

import json
from pathlib import Path

from mpmath import exp as e
from mpmath import hyp2f1 as f21
from mpmath import inf, log, log1p, mp, mpf, nstr, quad

mp.dps = 50

TRUNCATIONS = (1e-9, 1e-3, 0.1, 0.5, 0.9, 0.999999)
BETAS = (1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0)
STRETCHES = ((0.5, 0.625), (0.875, 1.0), (0.0, 0.75))


def integral(truncation: mpf, low: mpf, high: mpf, u: mpf) -> mpf:
    """log of the integral of (t/(1 - t))^u over the labels of the quantiles [low, high], by quadrature."""
    top = log(high - truncation) - log(1 - high + truncation)
    below = low <= truncation
    bottom = -inf if below else log(low - truncation) - log(1 - low + truncation)

    def integrand(x: mpf) -> mpf:
        return u * (x - top) - abs(x) - 2 * log1p(e(-abs(x))) + abs(top) + 2 * log1p(e(-abs(top)))

    edges, step = [top], 1 / max(u, mpf(1))
    while edges[-1] > max(bottom, -130 / u - abs(top) - 130):
        edges.append(max(edges[-1] - step, bottom))
        step = min(2 * step, mpf(2))
    total = quad(lambda x: e(integrand(x)), edges[::-1])
    return log(total) + u * top - abs(top) - 2 * log1p(e(-abs(top)))


def closed(truncation: mpf, u: mpf) -> mpf:
    """The same over [0, 1]."""
    z = 1 - truncation
    return (1 + u) * log(z) + (1 - u) * log(truncation) - log(1 + u) + log(f21(1, 2, 2 + u, z))


def main() -> None:
    rows = []
    for truncation in TRUNCATIONS:
        for beta in BETAS:
            t, u = mpf(truncation), 1 / mpf(beta)
            value = closed(t, u)
            assert abs(integral(t, mpf(0), mpf(1), u) - value) < mpf("1e-35") * max(1, abs(value))
            rows.append((truncation, beta, 0.0, 1.0, value))
            for low, high in STRETCHES:
                if high > truncation:
                    mean = integral(t, mpf(low), mpf(high), u) - log(mpf(high) - mpf(low))
                    rows.append((truncation, beta, low, high, mean))
    names = ("truncation", "beta", "low", "high")
    found = [dict(zip(names, row, strict=False)) | {"log_mean": nstr(row[4], 25)} for row in rows]
    text = ",\n".join(json.dumps(each) for each in found)
    Path(__file__).with_name("tup_partition.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
