"""Which processes run where, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slime.config.base import Group, arg, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Group):
    """Cluster: slots for trainers and engines. A slot is a GPU, or a CPU where there is none."""

    train_backend: Literal["megatron", "fsdp"] = arg("megatron", "What trains: Megatron-LM or PyTorch FSDP2.")
    device: Literal["auto", "cpu", "cuda"] = arg(
        "auto", "Where to train and sample; auto takes GPUs where Ray sees any."
    )
    actor_num_nodes: int = arg(1, "Nodes that train the actor.")
    actor_num_gpus_per_node: int = arg(8, "Slots on each of these nodes: one trainer rank a slot.")
    critic_num_nodes: int | None = arg(None, "Nodes that train the critic (default: it shares the actor's slots).")
    critic_num_gpus_per_node: int | None = arg(None, "Slots on each of these nodes (default: as many as the actor's).")
    context_parallel_size: int = arg(
        1, "Neighbouring trainer ranks that share the tokens of each sample, --max-tokens-per-gpu on each of them."
    )
    rollout_num_gpus: int | None = arg(None, "Slots for inference in all. With --colocate: the trainers' slots.")
    rollout_num_gpus_per_engine: int = arg(1, "Slots of one engine (its tensor-parallel size, over nodes if need be).")
    num_gpus_per_node: int | None = arg(None, "Slots of a node; no node is asked for more (default: what Ray finds).")
    colocate: bool = arg(False, "Trainers and engines share the same slots and take turns.")
    offload: bool = arg(False, "Both --offload-train and --offload-rollout.")
    offload_train: bool | None = arg(None, "Trainers give up device memory while engines sample (default: --colocate).")
    offload_rollout: bool | None = arg(
        None, "Engines give up device memory while trainers train (default: --colocate)."
    )
    distributed_backend: Literal["auto", "nccl", "gloo"] = arg(
        "auto", "Collectives: auto is nccl on GPUs, gloo on CPUs."
    )
    distributed_timeout_minutes: int = arg(10, "Deadline of one collective among trainers, in minutes.")
    num_threads: int | None = arg(
        None, "CPU threads of each trainer and each engine (default: the node's cores over the number of either)."
    )
    train_env_vars: dict[str, Any] = arg({}, "JSON: environment variables of the trainers' processes.")
    cluster_timeout_s: float = arg(120.0, "Deadline for the cluster to offer the slots asked for, in seconds.")
    engine_start_timeout_s: float = arg(600.0, "Deadline for engines and router to answer /health, in seconds.")
    trainer_start_timeout_s: float = arg(1800.0, "Deadline for trainers to load the model, in seconds.")
    rollout_timeout_s: float = arg(7200.0, "Deadline of one rollout or evaluation, in seconds.")
    train_timeout_s: float = arg(7200.0, "Deadline of training on one rollout, and of a save, in seconds.")
    weight_sync_timeout_s: float = arg(1800.0, "Deadline of one weight update, in seconds.")
    shutdown_grace_s: float = arg(60.0, "After SIGTERM: seconds to reach the next step boundary and save.")

    def __post_init__(self) -> None:
        check_positive(self, "actor_num_nodes", "actor_num_gpus_per_node")
        check_positive(self, "critic_num_nodes", "critic_num_gpus_per_node", "context_parallel_size")
        check_not_negative(self, "rollout_num_gpus")
        check_positive(self, "rollout_num_gpus_per_engine", "num_gpus_per_node", "num_threads")
        check_positive(self, "distributed_timeout_minutes", "cluster_timeout_s", "engine_start_timeout_s")
        check_positive(self, "trainer_start_timeout_s", "rollout_timeout_s", "train_timeout_s")
        check_positive(self, "weight_sync_timeout_s", "shutdown_grace_s")
        ill = [name for name, value in self.train_env_vars.items() if not isinstance(value, str | int | float)]
        check(not ill, "train_env_vars", "names with texts or numbers", ", ".join(ill))
        super().__post_init__()

    @property
    def num_trainers(self) -> int:
        """Ranks of the actor in all."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def num_data_ranks(self) -> int:
        """Shares in which the actor's ranks split the samples of a step."""
        return self.num_trainers // self.context_parallel_size

    @property
    def num_critics(self) -> int:
        """Ranks of the critic in all, where there is one."""
        nodes = self.actor_num_nodes if self.critic_num_nodes is None else self.critic_num_nodes
        per_node = self.critic_num_gpus_per_node
        return nodes * (self.actor_num_gpus_per_node if per_node is None else per_node)

    @property
    def has_critic_slots(self) -> bool:
        """Whether the critic has slots of its own; else it takes turns with the actor on the actor's."""
        return self.critic_num_nodes is not None or self.critic_num_gpus_per_node is not None
