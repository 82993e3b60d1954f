"""All groups of one run, flat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

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

    @property
    def num_engines(self) -> int:
        """Engines that sample."""
        if self.rollout_external_engine_addrs is not None:
            return len(self.rollout_external_engine_addrs)
        return (self.rollout_num_gpus or 0) // self.rollout_num_gpus_per_engine


RunT = TypeVar("RunT", bound=RunConfig)


def critic_settings(config: RunT) -> RunT:
    """`config` as the critic's trainer reads it: its own checkpoints and learning rate, nothing of the actor's."""
    save = config.critic_save or (str(Path(config.save) / "critic") if config.save is not None else None)
    return replace(
        config,
        load=save if config.resume else config.critic_load,
        ckpt_step=config.ckpt_step if config.critic_load is None else None,
        save=save,
        save_hf=None,
        lr=config.lr if config.critic_lr is None else config.critic_lr,
        min_lr=0.0 if config.critic_lr is not None else config.min_lr,
        lr_warmup_iters=config.critic_lr_warmup_iters,
        lr_warmup_fraction=None,
        ref_load=None,
        ref_ckpt_step=None,
    )
