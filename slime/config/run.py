"""All groups of one run, flat."""

from __future__ import annotations

from dataclasses import dataclass

from slime.config.algorithm import AlgorithmConfig
from slime.config.base import Group
from slime.config.checkpoint import CheckpointConfig
from slime.config.cluster import ClusterConfig
from slime.config.data import DataConfig
from slime.config.evaluate import EvaluateConfig
from slime.config.observe import ObserveConfig
from slime.config.optimizer import OptimizerConfig
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig

GROUPS: tuple[type[Group], ...] = (
    ClusterConfig,
    RolloutConfig,
    RewardConfig,
    DataConfig,
    AlgorithmConfig,
    OptimizerConfig,
    CheckpointConfig,
    EvaluateConfig,
    ObserveConfig,
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    ClusterConfig,
    RolloutConfig,
    RewardConfig,
    DataConfig,
    AlgorithmConfig,
    OptimizerConfig,
    CheckpointConfig,
    EvaluateConfig,
    ObserveConfig,
):
    """One flat, frozen object of all settings; it is each of its groups."""
