"""What one node, real Ray, is told from a cluster by."""

from __future__ import annotations

from typing import Any

import pytest

from slime.arguments import Args
from slime.ray.placement import NotEnoughSlots, Slots, allocate, num_slots, stays_on_machine

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize(
    ("router", "stays"), [(None, True), ("127.0.0.1", True), ("localhost", True), ("10.1.2.3", False)]
)
def test_one_node_stays_on_loopback_unless_its_router_is_elsewhere(router: str | None, stays: bool) -> None:
    port = None if router is None else 30000
    args = Args(train_backend="fsdp", sglang_router_ip=router, sglang_router_port=port)
    assert stays_on_machine(args) is stays


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"colocate": True}, 2),  # the critic takes turns with the trainers
        ({"rollout_num_gpus": 3}, 2 + 3),
        ({"rollout_num_gpus": 3, "critic_num_gpus_per_node": 1}, 2 + 1 + 3),
        ({"colocate": True, "critic_num_nodes": 2}, 2 + 2 * 2),
    ],
)
def test_a_critic_takes_slots_only_where_it_is_given_its_own(settings: dict[str, Any], slots: int) -> None:
    args = Args(train_backend="fsdp", actor_num_gpus_per_node=2, advantage_estimator="ppo", **settings)
    assert num_slots(args) == slots


def test_the_bundles_of_a_role_share_a_node_or_not() -> None:
    slots = Slots(None, "cpu", [0, 1], [1, 2], [0], node_of={0: "a", 1: "a", 2: "b"})  # type: ignore[arg-type]
    assert slots.share_node(slots.trainer_bundles)
    assert not slots.share_node(slots.critic_bundles)


def test_an_engine_lies_on_its_nodes_in_equal_parts() -> None:
    slots = Slots(None, "cpu", [], [], [0, 1, 2, 3, 4], node_of=dict(enumerate("aabba")))  # type: ignore[arg-type]
    assert slots.by_node([0, 1, 2, 3]) == [[0, 1], [2, 3]]
    assert slots.by_node([0, 4]) == [[0, 4]]
    with pytest.raises(NotEnoughSlots, match=r"engine of 3 slots would lie on 2 nodes as 2 \+ 1"):
        slots.by_node([0, 1, 2])


async def test_an_engine_is_shown_the_gpus_of_all_its_slots() -> None:
    slots = allocate(Args(train_backend="fsdp", actor_num_gpus_per_node=2, rollout_num_gpus=2, colocate=True))
    try:
        assert slots.device == "cuda"
        both = await slots.gpu_ids(slots.engine_bundles)
        assert sorted(both) == [",", "0", "1"]
        assert await slots.gpu_ids(slots.engine_bundles[1:]) == both[-1]
    finally:
        slots.release()
