"""Rules of slots: who has how many, and whether all can be shared out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from slime.config.rules.base import require
from slime.config.run import RunConfig
from slime.config.served_models import ServedModel, groups_of, read_served_models

logger = logging.getLogger(__name__)


def cluster_rules(config: RunConfig) -> dict[str, Any]:
    """Slots of trainers and engines, and who gives memory up."""
    external = config.rollout_external_engine_addrs
    models = _file_models(config)
    if config.debug_train_only:
        num_slots = 0
    elif models:
        num_slots = _slots_of(models, config)
    elif external is not None:
        _external_engines(config, external)
        num_slots = 0
    elif config.colocate:
        num_slots = config.num_trainers
    else:
        num_slots = config.rollout_num_gpus or 0
        require(num_slots > 0, "--rollout-num-gpus must be given and above 0, or --colocate.")
    if config.colocate and config.rollout_num_gpus not in (None, num_slots):
        logger.warning("--rollout-num-gpus %s is ignored: --colocate has %d", config.rollout_num_gpus, num_slots)
    require(
        config.num_gpus_per_node is None or config.actor_num_gpus_per_node <= config.num_gpus_per_node,
        f"--actor-num-gpus-per-node {config.actor_num_gpus_per_node} is more than a node has: --num-gpus-per-node "
        f"{config.num_gpus_per_node}.",
    )
    require(
        bool(models) or num_slots % config.rollout_num_gpus_per_engine == 0,
        f"--rollout-num-gpus-per-engine {config.rollout_num_gpus_per_engine} must divide the {num_slots} engine slots.",
    )
    require(
        config.colocate or not (config.offload or config.offload_train or config.offload_rollout),
        "--offload, --offload-train and --offload-rollout need --colocate: otherwise nobody else wants the memory.",
    )
    trainers = {} if config.debug_rollout_only else {"trainer": config.num_trainers}
    for role, num_ranks in (trainers | ({"critic": config.num_critics} if config.needs_critic else {})).items():
        require(
            num_ranks % config.context_parallel_size == 0,
            f"--context-parallel-size {config.context_parallel_size} must divide the {num_ranks} {role} ranks.",
        )
    return {
        "file_models": models,
        "rollout_num_gpus": num_slots,
        "offload_train": config.colocate if config.offload_train is None else config.offload_train,
        "offload_rollout": config.colocate if config.offload_rollout is None else config.offload_rollout,
    }


def _file_models(config: RunConfig) -> tuple[ServedModel, ...]:
    """The models of --sglang-config; none without it, or without engines."""
    if config.sglang_config is None or config.debug_train_only:
        return ()
    others = {
        "--prefill-num-servers": config.prefill_num_servers,
        "--rollout-external-engine-addrs": config.rollout_external_engine_addrs,
        "--sglang-router-ip": config.sglang_router_ip,
    }
    given = [flag for flag, value in others.items() if value is not None]
    names = ", ".join(given)
    require(not given, f"--sglang-config names all engines, and starts a router for each model: drop {names}.")
    return read_served_models(
        config.sglang_config,
        checkpoint=config.hf_checkpoint,
        num_gpus_per_engine=config.rollout_num_gpus_per_engine,
    )


def _slots_of(models: Sequence[ServedModel], config: RunConfig) -> int:
    """Slots of all groups: those of the trainers with --colocate, else those of --rollout-num-gpus where given."""
    num_slots = sum(group.num_gpus for _, group in groups_of(models))
    wanted, flag = config.rollout_num_gpus, "--rollout-num-gpus"
    if config.colocate:
        wanted, flag = config.num_trainers, "the trainers' slots (--colocate)"
    require(
        wanted in (None, num_slots),
        f"--sglang-config: {config.sglang_config}: its groups have {num_slots} slots in all, {flag} {wanted}: they "
        "must be equal; a group of worker_type placeholder takes slots without engines.",
    )
    return num_slots


def _external_engines(config: RunConfig, addresses: list[str]) -> None:
    for address in addresses:
        host, _, port = address.rpartition(":")
        require(
            bool(host) and "/" not in host and port.isdecimal(),
            f"--rollout-external-engine-addrs takes HOST:PORT, got {address!r}.",
        )
    require(
        len(set(addresses)) == len(addresses),
        "--rollout-external-engine-addrs names an engine twice: drop one of them.",
    )
    require(
        not config.colocate,
        "--rollout-external-engine-addrs: engines of somebody else share no slots with trainers. Drop --colocate or "
        "--debug-rollout-only.",
    )
    if config.rollout_num_gpus is not None:
        logger.warning("--rollout-num-gpus %s is ignored: all engines are external", config.rollout_num_gpus)
