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


def communication(setting: str, device: torch.device, *, cpu_backend: str | None = None) -> str:
    """What ranks talk through. setting: a backend's name, or `auto`. cpu_backend: for tensors on the host of a GPU."""
    backend = ("nccl" if device.type == "cuda" else "gloo") if setting == "auto" else setting
    return backend if cpu_backend is None or device.type == "cpu" else f"cpu:{cpu_backend},{device.type}:{backend}"


def pick_device(setting: str) -> torch.device:
    """`auto`: the GPU that this process may see first, else the CPU."""
    if setting == "cuda" or (setting == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
