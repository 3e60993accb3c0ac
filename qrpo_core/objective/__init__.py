"""The mathematics of QRPO: quantile rewards, partition functions, targets, losses and their diagnostics.

The numpy parts are imported here. The torch parts are the modules `losses` and `logprobs`, so that a pipeline
run that finds everything in the store does not import torch; scipy loads in the functions that call it.
"""

from __future__ import annotations

from qrpo_core.objective.allocation import (
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
from qrpo_core.objective.clipping import clip_log_ratio
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.diagnostics import (
    NormalizationCheck,
    RewardDiagnostics,
    Saturation,
    Uniformity,
    length_correlation,
    normalization_check,
    rank_uniformity,
    reward_diagnostics,
    saturation,
)
from qrpo_core.objective.expected_weights import ExpectedWeights, expected_weights
from qrpo_core.objective.log_partition import finite_log_partition
from qrpo_core.objective.normalisers import NORMALISERS, Normaliser
from qrpo_core.objective.quadrature import quadrature_log_partition
from qrpo_core.objective.quantiles import (
    TIE_METHODS,
    RankCounts,
    TieMethod,
    exchangeable_quantile,
    leave_one_out_counts,
    quantile,
    quantile_interval,
    rank_counts,
    rank_counts_table,
    tie_rate,
)
from qrpo_core.objective.targets import CalibratedTargets, calibrated_targets, reference_targets
from qrpo_core.objective.tie_aware import tie_aware_log_partition
from qrpo_core.objective.transforms import TRANSFORM_NAMES, RewardTransform, get_transform
from qrpo_core.objective.truncated_logit import TruncatedLogit
from qrpo_core.objective.values import value_targets

__all__ = [
    "NORMALISERS",
    "TIE_METHODS",
    "TRANSFORM_NAMES",
    "Allocation",
    "CalibratedTargets",
    "DensityRatio",
    "ExpectedWeights",
    "Normaliser",
    "NormalizationCheck",
    "ObjectiveFacts",
    "RankCounts",
    "RewardDiagnostics",
    "RewardTransform",
    "Saturation",
    "TieMethod",
    "TruncatedLogit",
    "Uniformity",
    "allocate_references",
    "calibrated_targets",
    "clip_log_ratio",
    "exchangeable_quantile",
    "expected_weights",
    "finite_log_partition",
    "get_transform",
    "leave_one_out_counts",
    "length_correlation",
    "marginal_gain",
    "normalization_check",
    "objective_facts",
    "quadrature_log_partition",
    "quantile",
    "quantile_interval",
    "quantile_standard_error",
    "rank_counts",
    "rank_counts_table",
    "rank_uniformity",
    "reference_targets",
    "references_needed",
    "reward_diagnostics",
    "saturation",
    "target_standard_error",
    "threshold_quantile",
    "tie_aware_log_partition",
    "tie_rate",
    "value_targets",
]
