"""How far two computations of one number may lie apart when nothing but the order of the arithmetic differs.

Another processor, another batch or another number of processes adds the same terms in another order, and
every order rounds differently. A tolerance follows from that, and from nothing that one machine measured.
"""

from __future__ import annotations

import math

#: Unit roundoff: half the distance from 1 to the next number.
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

#: Rounding errors of n operations add up like a random walk: they exceed LAMBDA * sqrt(n) * u of the sum of
#: magnitudes with a probability below 2n * exp(-LAMBDA**2 / 2) (Higham and Mary 2019, A new approach to
#: probabilistic rounding error analysis, theorem 2.4): 1e-4 at n = 4,000, and in practice never.
LAMBDA = 6.0


def reordered(roundings: int, *, condition: float = 1.0, dtype: str = "float32") -> float:
    """Largest relative difference of two results that round `roundings` times on the way, in any order.

    condition : by how much an error of the terms grows in the result: the sum of magnitudes over the
        magnitude of the sum, the derivative of a logarithm, and the like.
    """
    return 2 * LAMBDA * math.sqrt(roundings) * UNIT[dtype] * condition


def reordered_weights(gradient: float) -> float:
    """Largest norm of a difference of trained weights, over the norm of their movement under Adam.

    gradient : relative difference of the gradients. Adam moves a weight by the learning rate, whatever the
    size of its gradient, so those whose gradient is within that difference of zero may move either way. They
    are a share `gradient` of all, and each differs by two steps at most. The loss does not feel it: their
    gradients are zero.
    """
    return 2 * math.sqrt(gradient)
