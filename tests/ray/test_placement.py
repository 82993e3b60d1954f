"""What one node, real Ray, is told from a cluster by."""

from __future__ import annotations

import pytest

from slime.arguments import Args
from slime.ray.placement import stays_on_machine

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize(
    ("router", "stays"), [(None, True), ("127.0.0.1", True), ("localhost", True), ("10.1.2.3", False)]
)
def test_one_node_stays_on_loopback_unless_its_router_is_elsewhere(router: str | None, stays: bool) -> None:
    port = None if router is None else 30000
    args = Args(train_backend="fsdp", sglang_router_ip=router, sglang_router_port=port)
    assert stays_on_machine(args) is stays
