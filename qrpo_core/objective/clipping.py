"""A limit on what a target asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.objective.targets import CalibratedTargets


def clip_log_ratio(targets: CalibratedTargets, limit: float) -> tuple[CalibratedTargets, int]:
    """The targets with |target/beta| <= limit, and how many that changes.

    The density ratios that are asked for then lie in [exp(-limit), exp(limit)], and no longer integrate to 1.
    A target of -inf (probability 0) becomes -limit nats.

    Parameters
    ----------
    limit : > 0, nats.

    Raises
    ------
    ObjectiveError : limit not finite or <= 0.
    """
    if not 0.0 < limit < np.inf:
        raise ObjectiveError(f"the limit of a target log-ratio must be a number of nats > 0, got {limit}")
    ends = limit * targets.beta
    clipped = np.clip(targets.target, -ends, ends)
    return replace(targets, target=clipped), int((clipped != targets.target).sum())
