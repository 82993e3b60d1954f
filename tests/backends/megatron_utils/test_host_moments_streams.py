"""Waves of moments on streams that run in any order which their waits allow; a GPU shows one of these orders."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from slime.backends.megatron_utils import host_moments
from slime.backends.megatron_utils.adam import GroupStepAdamW

Event = set[int]
"""Numbers of the operations that it comes after."""


class Device:
    """Keeps operations until somebody waits. done: in which order they ran."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.operations: list[tuple[Callable[[], None], Event]] = []
        self.done: list[int] = []
        self.current = self.work = Stream(self)

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self.operations.append((partial(function, *arguments), self.current.after))
        self.current.after = {len(self.operations) - 1}

    def run(self, wanted: Event) -> None:
        """Operations in a random order, until `wanted` are done."""
        while not wanted <= set(self.done):
            left = [number for number in range(len(self.operations)) if number not in self.done]
            number = self.random.choice([number for number in left if self.operations[number][1] <= set(self.done)])
            self.operations[number][0]()
            self.done.append(number)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    """after: what its next operation comes after."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.after: Event = set()

    def record_event(self) -> Event:
        return self.after

    def wait_event(self, event: Event) -> None:
        self.after = self.after | event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.after)

    def synchronize(self) -> None:
        self.device.run(self.after)


@pytest.fixture(params=range(5))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    simulated = Device(request.param)
    monkeypatch.setattr(host_moments, "WAVE", 128)
    for name in ("_copy", "_update_pieces"):
        monkeypatch.setattr(host_moments, name, partial(simulated.submit, getattr(host_moments, name)))
    lanes = host_moments._Lanes
    monkeypatch.setattr(host_moments, "_Lanes", lambda device: lanes(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: simulated.work)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(simulated))
    monkeypatch.setattr(torch.cuda, "stream", simulated.on)
    return simulated


def updated(share: float) -> list[torch.Tensor]:
    """Parameters and moments after some steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (500, 3, 300, 700)]
    optimizer = GroupStepAdamW(params, lr=0.1)
    if share > 0:
        optimizer.keep_on_host(share)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [tensor for param in params for tensor in (param.detach(), *optimizer.state[param].values())]


def test_any_order_of_copies_and_kernels_updates_the_same(device: Device) -> None:
    found = updated(1.0)
    assert device.done != sorted(device.done)  # streams overtook each other
    assert len(device.done) == len(device.operations) == 3 * 3 * 14  # in, work and out of each step's waves
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, updated(0.0), strict=True))
