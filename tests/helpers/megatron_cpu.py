"""megatron-core on a machine without GPUs: what asks for CUDA gets the CPU. Maths, schedules, sharding and checkpoint
layouts are Megatron's own; kernels, streams and memory of a GPU are not shown by tests that use this.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import logging
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._device

CPU = torch.device("cpu")
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "rand", "randn", "randint"),
    *("randperm", "eye", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
    "randn_like",
)
TENSOR_FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_tensor", "new_full")
GIBIBYTE = 1 << 30


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Until it ends, `cuda` means the CPU to torch's factories and Megatron runs here; nothing happens with a GPU.

    `torch.cuda.is_available()` stays False. Import Megatron inside.
    """
    if torch.cuda.is_available():
        yield
        return
    importlib.import_module("torch._dynamo")  # it lists torch's functions when it is imported: the originals
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):  # the compiler asks for GPUs
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        _redirect_tensors(patch)
        _redirect_cuda(patch)
        _redirect_barrier(patch)
        _redirect_uneven_collectives(patch)
        _redirect_megatron(patch)
        yield


def _redirect_tensors(patch: pytest.MonkeyPatch) -> None:
    """Functions, not a TorchFunctionMode: a mode is off inside Tensor.backward."""
    # `with torch.device(...)` knows factories by identity, from a set that is made once: of the originals.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        patch.setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in TENSOR_FACTORIES:
        patch.setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(value) else value for value in args[:1]) + args[1:]
        return original_to(self, *args, **_cpu_options(options))

    def type_(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = original_type(self, *args, **options)
        is_name = isinstance(found, str) and not found.startswith("torch.cuda.")
        return found.replace("torch.", "torch.cuda.", 1) if is_name else found

    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.Tensor, "type", type_)
    patch.setattr(torch.Tensor, "cuda", lambda self, *args, **options: self)
    patch.setattr(torch.Tensor, "pin_memory", lambda self, *args, **options: self)
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **options: Any) -> Any:
        return factory(*args, **_cpu_options(options))

    return make


def _cpu_options(options: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(options.get("device")):
        options["device"] = CPU
    if options.get("pin_memory"):
        options["pin_memory"] = False
    return options


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.partition(":")[0] == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class _Stream:
    """A stream in which everything has already happened."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        self.time = time.perf_counter()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def elapsed_time(self, other: _Stream) -> float:
        return (other.time - self.time) * 1e3

    def record(self, *args: Any) -> None:
        self.time = time.perf_counter()

    def wait(self, *args: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = wait


class _Event(_Stream):
    """Another name for the compiler, which knows what stands under each by identity."""


def _returns(value: Any) -> Callable[..., Any]:
    """A function of its own each time: the compiler refuses one that stands under two names of torch."""
    return lambda *args, **options: value


def _redirect_cuda(patch: pytest.MonkeyPatch) -> None:
    stream = _Stream()
    properties = types.SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=16 * GIBIBYTE, multi_processor_count=1
    )
    stand_ins: dict[str, Callable[..., Any]] = {
        "current_device": lambda: CPU,  # YaRN makes a torch.device of it
        "device_count": lambda: 1,
        "current_stream": lambda *args, **options: stream,
        "default_stream": lambda *args, **options: stream,
        "stream": contextlib.nullcontext,
        "get_rng_state": lambda *args, **options: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **options: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "memory_stats": lambda *args, **options: collections.defaultdict(int),
        "mem_get_info": lambda *args, **options: (16 * GIBIBYTE, 16 * GIBIBYTE),
        "get_device_capability": lambda *args, **options: (9, 0),
        "get_device_properties": lambda *args, **options: properties,
        "Stream": _Stream,
        "Event": _Event,
    }
    calls = ("set_device", "synchronize", "empty_cache", "set_stream", "ipc_collect", "reset_peak_memory_stats")
    numbers = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    stand_ins |= {name: _returns(None) for name in calls}
    stand_ins |= {name: _returns(0) for name in (*numbers, "device_memory_used")}
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in, raising=False)
    for name in ("get_rng_state", "set_rng_state"):
        patch.setattr(torch.cuda.random, name, stand_ins[name])
    for name in ("range_push", "range_pop", "mark"):
        patch.setattr(torch.cuda.nvtx, name, _returns(None))


def _redirect_barrier(patch: pytest.MonkeyPatch) -> None:
    """gloo's refuses device_ids."""
    original = dist.barrier

    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, **options: Any) -> Any:
        return original(group=group, async_op=async_op)

    patch.setattr(dist, "barrier", barrier)
    patch.setattr(dist.distributed_c10d, "barrier", barrier)


def _redirect_uneven_collectives(patch: pytest.MonkeyPatch) -> None:
    """gloo wants parts of one size; NCCL does not, and tokens of experts that ranks share are not."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def gather(parts: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in parts}) == 1:
            return all_gather(parts, tensor, group=group, async_op=async_op)
        for rank, part in enumerate(parts):
            if rank == dist.get_rank(group):
                part.copy_(tensor)
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return None

    def scatter(output: torch.Tensor, parts: list[torch.Tensor], *args: Any, group: Any = None, **options: Any) -> Any:
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(output, parts, *args, group=group, **options)
        whole = torch.cat(parts)
        dist.all_reduce(whole, *args, group=group)
        output.copy_(whole.split([len(part) for part in parts])[dist.get_rank(group)])
        return None

    patch.setattr(dist, "all_gather", gather)
    patch.setattr(dist, "reduce_scatter", scatter)


def _redirect_megatron(patch: pytest.MonkeyPatch) -> None:
    """What Megatron calls past torch.cuda; of 0.16."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    patch.setattr(random, "_set_cuda_rng_state", set_state)
    # The CPU's generator is the device's here: its change is no mistake.
    patch.setattr(logging.getLogger(random.__name__), "level", logging.CRITICAL)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    patch.setattr(moe_utils, "maybe_move_tensor_to_cpu", to_host)  # splits stay tensors where they are not `is_cuda`
    patch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)
