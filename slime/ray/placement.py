"""Slots of the cluster: one placement group, its bundles sorted by node."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.arguments import Args
from slime.config import ClusterConfig
from slime.utils.http_utils import is_loopback

logger = logging.getLogger(__name__)

_SHARE = {"actor": 0.4, "critic": 0.4, "engine": 0.2}  # of a slot: all three fit into one


class NotEnoughSlots(RuntimeError):
    """The cluster does not offer what was asked for."""


@dataclass(frozen=True)
class Slots:
    """Bundles of the placement group: which train, which sample (the same ones when colocated).

    critic_bundles: the trainers', unless the critic has slots of its own.
    """

    group: PlacementGroup
    device: str  # "cuda" or "cpu"
    trainer_bundles: list[int]
    critic_bundles: list[int]
    engine_bundles: list[int]
    node_of: dict[int, str]

    def share_node(self, bundles: list[int]) -> bool:
        """Whether all of these lie on one node."""
        return len({self.node_of[bundle] for bundle in bundles}) == 1

    def by_node(self, bundles: list[int]) -> list[list[int]]:
        """The bundles of an engine, node by node. Raises NotEnoughSlots where its nodes do not give equal parts."""
        nodes = list(dict.fromkeys(self.node_of[bundle] for bundle in bundles))
        parts = [[bundle for bundle in bundles if self.node_of[bundle] == node] for node in nodes]
        if len({len(part) for part in parts}) > 1:
            sizes = " + ".join(str(len(part)) for part in parts)
            raise NotEnoughSlots(
                f"an engine of {len(bundles)} slots would lie on {len(parts)} nodes as {sizes}: its nodes must give "
                "equal parts. Choose --rollout-num-gpus-per-engine so that engines fill nodes."
            )
        return parts

    async def gpu_ids(self, bundles: list[int]) -> str:
        """The GPUs of bundles on one node, as CUDA_VISIBLE_DEVICES has them."""
        probe: Any = ray.remote(_gpu_ids)
        probes = [probe.options(**self.options(bundle, "engine")).remote() for bundle in bundles]
        ids: list[list[int | str]] = await asyncio.gather(*probes)
        return ",".join(str(gpu) for (gpu,) in ids)

    def options(self, bundle: int, role: str) -> dict[str, object]:
        """Ray options of an actor of `role` ("actor", "critic" or "engine") in a bundle."""
        resource = "num_gpus" if self.device == "cuda" else "num_cpus"
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        return {"num_cpus": 0, "scheduling_strategy": strategy} | {resource: _SHARE[role]}

    def release(self) -> None:
        """Give the slots back."""
        remove_placement_group(self.group)


def _gpu_ids() -> list[int] | list[str]:
    return ray.get_gpu_ids()


def start_ray(cluster: ClusterConfig) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one in this machine that ends with this process.

    Returns whether one was started. A local one has as many CPU slots as the run asks for: slots are turns, not cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    env = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path)),
        # Threads that wait by spinning take the cores from those that work: ten times as long on a busy machine.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    os.environ.update(env)
    if "RAY_ADDRESS" in os.environ or ray.is_initialized():
        ray.init(ignore_reinit_error=True, runtime_env={"env_vars": env})
        return False
    # Killed with this process, Ray's head is looked for by Ray's agents: for a minute by default, before they end.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    # Workers run at the priority of whoever started them; Ray would put them behind everything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",  # also where another cluster runs in this machine
        num_cpus=num_slots(cluster) + 1,
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
    )
    return True


def num_slots(cluster: ClusterConfig) -> int:
    """Slots of the run in all."""
    return num_training_slots(cluster) + (0 if cluster.colocate else cluster.rollout_num_gpus or 0)


def num_training_slots(cluster: ClusterConfig) -> int:
    """Slots of the trainers, and of a critic that has its own."""
    return cluster.num_trainers + (cluster.num_critics if cluster.has_critic_slots else 0)


def stays_on_machine(args: Args) -> bool:
    """Whether engines and router can do with loopback: one node, and no router on another machine has to reach them."""
    num_nodes = len({node["NodeID"] for node in ray.nodes() if node["Alive"]})
    return num_nodes == 1 and (args.sglang_router_ip is None or is_loopback(args.sglang_router_ip))


def allocate(cluster: ClusterConfig) -> Slots:
    """Reserve the slots. Raises NotEnoughSlots, with what there is, after `cluster_timeout_s`."""
    device = _choose_device(cluster)
    resource = "GPU" if device == "cuda" else "CPU"
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
    wanted = num_slots(cluster)
    offered = ray.cluster_resources().get(resource, 0)
    if offered < wanted:
        raise NotEnoughSlots(f"the run asks for {wanted} {resource} slots, the cluster has {offered:g}")
    group = placement_group([bundle] * wanted, strategy="PACK")
    if not group.wait(cluster.cluster_timeout_s):
        remove_placement_group(group)
        free = ray.available_resources().get(resource, 0)
        raise NotEnoughSlots(
            f"{wanted} {resource} slots were not free within {cluster.cluster_timeout_s:g} s; {free:g} are free now"
        )
    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    bundles = _sorted_bundles(node_of)
    trainers, critics = bundles[: cluster.num_trainers], bundles[cluster.num_trainers : num_training_slots(cluster)]
    first_engine = 0 if cluster.colocate else num_training_slots(cluster)
    num_engine_slots = cluster.rollout_num_gpus or 0
    return Slots(
        group,
        device,
        trainer_bundles=trainers,
        critic_bundles=critics or trainers,
        engine_bundles=bundles[first_engine : first_engine + num_engine_slots],
        node_of=node_of,
    )


def _choose_device(cluster: ClusterConfig) -> str:
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def _sorted_bundles(node_of: dict[int, str]) -> list[int]:
    """Bundle indices by node address, so that neighbours in the list are neighbours in the cluster."""
    address_of = {node["NodeID"]: int(ipaddress.ip_address(node["NodeManagerAddress"])) for node in ray.nodes()}
    return sorted(node_of, key=lambda bundle: (address_of[node_of[bundle]], bundle))
