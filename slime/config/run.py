"""All groups of one run, flat."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from slime.config.precision import PrecisionConfig
from slime.config.reward import RewardConfig
from slime.config.rollout import RolloutConfig
from slime.config.served_models import POLICY, ServedModel, ServerGroup

GROUPS: tuple[type[Group], ...] = (
    ClusterConfig,
    RolloutConfig,
    RewardConfig,
    DataConfig,
    AlgorithmConfig,
    OptimizerConfig,
    PrecisionConfig,
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
    PrecisionConfig,
    CheckpointConfig,
    EvaluateConfig,
    ObserveConfig,
):
    """One flat, frozen object of all settings; it is each of its groups.

    file_models: what --sglang-config says. sglang_model_routers: host and port of each model's router, by its name,
    once the run has started. Neither is a flag.
    """

    file_models: tuple[ServedModel, ...] = ()
    sglang_model_routers: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def served_models(self) -> tuple[ServedModel, ...]:
        """What engines serve, in the order of their slots: the models of --sglang-config, else the policy alone."""
        return self.file_models or (self._policy_of_flags(),)

    @property
    def policy(self) -> ServedModel:
        """The model that is trained."""
        return next(model for model in self.served_models if model.update_weights)

    def _policy_of_flags(self) -> ServedModel:
        size = self.rollout_num_gpus_per_engine
        num_prefill_gpus = (self.prefill_num_servers or 0) * size
        num_others = (self.rollout_num_gpus or 0) - num_prefill_gpus
        others = ServerGroup("regular" if self.prefill_num_servers is None else "decode", num_others, size)
        prefill = [ServerGroup("prefill", num_prefill_gpus, size)] if num_prefill_gpus else []
        return ServedModel(POLICY, self.hf_checkpoint, update_weights=True, groups=(*prefill, others))

    @property
    def num_engines(self) -> int:
        """Engines that sample from the policy."""
        if self.rollout_external_engine_addrs is not None:
            return len(self.rollout_external_engine_addrs)
        return self.policy.num_engines

    @property
    def policy_engine_size(self) -> int | None:
        """Slots of each engine where all serve the policy and fill all slots in order; None where they do not."""
        sizes = {group.num_gpus_per_engine for group in self.policy.groups}
        has_gaps = any(group.worker_type == "placeholder" for group in self.policy.groups)
        return None if has_gaps or len(sizes) > 1 or len(self.served_models) > 1 else sizes.pop()


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
        async_save=False,  # complete before the actor's, whose tracker makes both count
        lr=config.lr if config.critic_lr is None else config.critic_lr,
        min_lr=0.0 if config.critic_lr is not None else config.min_lr,
        lr_warmup_iters=config.critic_lr_warmup_iters,
        lr_warmup_fraction=None,
        ref_load=None,
        ref_ckpt_step=None,
    )
