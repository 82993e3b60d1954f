from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from slime.utils.distributed import init_process_group, open_listener, pick_device
from slime.utils.http_utils import find_free_port


@pytest.fixture(autouse=True)
def _no_world_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_world_forms_where_rank_0_listens() -> None:
    listener = open_listener("127.0.0.1")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", listener.getsockname()[1]), reuse_port=False)
    init_process_group(backend="gloo", rank=0, world_size=1, address=address, timeout_minutes=1, listener=listener)
    values = torch.ones(2)
    dist.all_reduce(values)
    assert values.tolist() == [1.0, 1.0]


def test_a_rank_that_does_not_come_ends_the_wait_at_the_deadline() -> None:
    address = f"127.0.0.1:{find_free_port('127.0.0.1')}"
    with pytest.raises(dist.DistError, match="1/2 clients joined"):
        init_process_group(backend="gloo", rank=0, world_size=2, address=address, timeout_minutes=1 / 60)


@pytest.mark.parametrize("setting", ["auto", "cpu"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="what auto means depends on the machine")
def test_without_a_gpu_everything_is_on_the_cpu(setting: str) -> None:
    assert pick_device(setting) == torch.device("cpu")
