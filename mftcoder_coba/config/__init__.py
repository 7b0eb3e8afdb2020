"""The experiment as typed, validated data. Importing this package never imports torch."""

from mftcoder_coba.config.loading import load_config, validate
from mftcoder_coba.config.schema import (
    AdapterConfig,
    BalancerConfig,
    CheckpointConfig,
    CobaConfig,
    Config,
    DataConfig,
    EarlyStoppingConfig,
    FixedConfig,
    ModelConfig,
    ProportionalConfig,
    RunConfig,
    TaskConfig,
    TrackingConfig,
    TrainingConfig,
    UniformConfig,
    ValidationConfig,
)

__all__ = [
    "AdapterConfig",
    "BalancerConfig",
    "CheckpointConfig",
    "CobaConfig",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "FixedConfig",
    "ModelConfig",
    "ProportionalConfig",
    "RunConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UniformConfig",
    "ValidationConfig",
    "load_config",
    "validate",
]
