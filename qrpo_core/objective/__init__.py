"""The mathematics of QRPO: quantile rewards, partition functions, targets, losses and their diagnostics.

The numpy parts are imported here. The torch parts (losses, logprobs) load on first use, so that a pipeline
run that finds everything in the store does not pay for torch; scipy loads in the functions that call it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qrpo_core.objective.diagnostics import (
    Calibration,
    RewardDiagnostics,
    Saturation,
    calibration,
    length_correlation,
    reward_diagnostics,
    saturation,
)
from qrpo_core.objective.normalization import NormalizationCheck, normalization_check
from qrpo_core.objective.partition import (
    empirical_log_partition,
    finite_log_partition,
    laplace_log_partition,
    quadrature_log_partition,
)
from qrpo_core.objective.planner import (
    Allocation,
    ObjectiveFacts,
    allocate_references,
    marginal_gain,
    objective_facts,
    quantile_standard_error,
    references_needed,
    target_standard_error,
    threshold_quantile,
)
from qrpo_core.objective.quantiles import (
    CONVENTIONS,
    Convention,
    RankCounts,
    exchangeable_quantile,
    has_ties,
    leave_one_out_counts,
    quantile,
    quantile_interval,
    rank_counts,
    rank_counts_table,
    tie_rate,
)
from qrpo_core.objective.references import SortedReferences, sort_references
from qrpo_core.objective.targets import (
    NORMALISERS,
    CalibratedTargets,
    Normaliser,
    calibrated_targets,
    reference_targets,
)
from qrpo_core.objective.transforms import TRANSFORM_NAMES, RewardTransform, get_transform

if TYPE_CHECKING:
    from qrpo_core.objective.logprobs import completion_logprobs, completion_token_logprobs
    from qrpo_core.objective.losses import (
        divide_by_length,
        dpo_loss,
        qrpo_absolute_loss,
        qrpo_loss,
        qrpo_residual,
        qrpo_squared_loss,
        rebel_loss,
        sft_loss,
        simpo_loss,
    )

_TORCH = {
    "completion_logprobs": "logprobs",
    "completion_token_logprobs": "logprobs",
    "divide_by_length": "losses",
    "dpo_loss": "losses",
    "qrpo_absolute_loss": "losses",
    "qrpo_loss": "losses",
    "qrpo_residual": "losses",
    "qrpo_squared_loss": "losses",
    "rebel_loss": "losses",
    "sft_loss": "losses",
    "simpo_loss": "losses",
}

__all__ = [
    "CONVENTIONS",
    "NORMALISERS",
    "TRANSFORM_NAMES",
    "Allocation",
    "CalibratedTargets",
    "Calibration",
    "Convention",
    "Normaliser",
    "NormalizationCheck",
    "ObjectiveFacts",
    "RankCounts",
    "RewardDiagnostics",
    "RewardTransform",
    "Saturation",
    "SortedReferences",
    "allocate_references",
    "calibrated_targets",
    "calibration",
    "completion_logprobs",
    "completion_token_logprobs",
    "divide_by_length",
    "dpo_loss",
    "empirical_log_partition",
    "exchangeable_quantile",
    "finite_log_partition",
    "get_transform",
    "has_ties",
    "laplace_log_partition",
    "leave_one_out_counts",
    "length_correlation",
    "marginal_gain",
    "normalization_check",
    "objective_facts",
    "qrpo_absolute_loss",
    "qrpo_loss",
    "qrpo_residual",
    "qrpo_squared_loss",
    "quadrature_log_partition",
    "quantile",
    "quantile_interval",
    "quantile_standard_error",
    "rank_counts",
    "rank_counts_table",
    "rebel_loss",
    "reference_targets",
    "references_needed",
    "reward_diagnostics",
    "saturation",
    "sft_loss",
    "simpo_loss",
    "sort_references",
    "target_standard_error",
    "threshold_quantile",
    "tie_rate",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_TORCH[name]}"), name)
