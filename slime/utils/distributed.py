"""Process groups with a deadline."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist


def init_process_group(*, backend: str, rank: int, world_size: int, address: str, timeout_minutes: float) -> None:
    """Join the world of trainers. address: `host:port` of rank 0. Raises a torch error naming the deadline."""
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def pick_device(setting: str) -> torch.device:
    """`auto`: the GPU that this process may see first, else the CPU."""
    if setting == "cuda" or (setting == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
