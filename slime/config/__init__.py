"""What a run is: typed groups of settings. Each field is at once a flag, a file key and a line of the reference."""

from slime.config.algorithm import AlgorithmConfig
from slime.config.base import ConfigError, Group
from slime.config.checkpoint import CheckpointConfig
from slime.config.cluster import ClusterConfig
from slime.config.data import DataConfig
from slime.config.evaluate import EvaluateConfig
from slime.config.observe import ObserveConfig
from slime.config.optimizer import OptimizerConfig
from slime.config.precision import PrecisionConfig
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "Group",
    "ObserveConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RewardConfig",
    "RolloutConfig",
]
