from __future__ import annotations

import torch

from slime.observability.counters import Counters


def test_what_is_compiled_is_counted_once() -> None:
    counters = Counters()
    compiled = torch.compile(lambda values: (values.sin() * values).sum(), backend="aot_eager", dynamic=True)
    counters.collect()
    compiled(torch.randn(8, requires_grad=True)).backward()
    first = counters.collect()
    compiled(torch.randn(9, requires_grad=True)).backward()
    second = counters.collect()
    assert first["perf/train_graphs"] == 1
    assert first["perf/train_compile_time"] > 0
    assert second["perf/train_graphs"] == second["perf/train_compile_time"] == 0
