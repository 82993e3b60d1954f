"""What training did besides computing: graphs compiled, memory asked of the GPU. Metrics `perf/train_*`.

Explains a step that takes longer than its tokens do: compilation for new shapes, an allocator that is empty after each
wake-up, or has to give memory back before it gets some.
"""

from __future__ import annotations

import sys

import torch

_COMPILING = ("entire_frame_compile", "entire_backward_compile")


class Counters:
    """Counts of this process, from one call of `collect` to the next."""

    def __init__(self) -> None:
        self._before = _totals()

    def collect(self) -> dict[str, float]:
        """`perf/train_compile_time` in seconds, `perf/train_graphs`, and on a GPU `perf/train_cuda_mallocs` and those
        that failed at first, `perf/train_cuda_malloc_retries`."""
        before, self._before = self._before, _totals()
        return {f"perf/train_{name}": value - before.get(name, 0.0) for name, value in self._before.items()}


def _totals() -> dict[str, float]:
    totals = {"compile_time": 0.0, "graphs": 0.0}
    dynamo = sys.modules.get("torch._dynamo.utils")  # unless something was compiled it is not there
    if dynamo is not None:
        totals["compile_time"] = sum(dynamo.cumulative_time_spent_ns.get(name, 0.0) for name in _COMPILING) / 1e9
        totals["graphs"] = float(dynamo.counters["stats"]["unique_graphs"])
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        totals["cuda_mallocs"] = float(stats.get("num_device_alloc", 0))
        totals["cuda_malloc_retries"] = float(stats.get("num_alloc_retries", 0))
    return totals
