"""One experiment as frozen models, closed to unknown keys: one file a section."""

from qrpo_core.config.engines import EndpointConfig, FakeConfig, ParityConfig, SamplingConfig, VllmConfig
from qrpo_core.config.experiment import (
    EvaluationConfig,
    Experiment,
    ModelConfig,
    ServiceConfig,
    StoreConfig,
    TopUpConfig,
)
from qrpo_core.config.objective import ObjectiveConfig
from qrpo_core.config.pool_report import PoolReportConfig
from qrpo_core.config.prompts import PromptsConfig
from qrpo_core.config.rewards import RewardConfig, WeightedTerm
from qrpo_core.config.section import Section, cache_key_fields
from qrpo_core.config.training import RoundsConfig, TrainingConfig, TrainingDataConfig

__all__ = [
    "EndpointConfig",
    "EvaluationConfig",
    "Experiment",
    "FakeConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParityConfig",
    "PoolReportConfig",
    "PromptsConfig",
    "RewardConfig",
    "RoundsConfig",
    "SamplingConfig",
    "Section",
    "ServiceConfig",
    "StoreConfig",
    "TopUpConfig",
    "TrainingConfig",
    "TrainingDataConfig",
    "VllmConfig",
    "WeightedTerm",
    "cache_key_fields",
]
