"""Adam's moments in page-locked host memory. To be updated they come to the GPU, a wave of some megabytes at a time.

The moments of parameters lie end to end, in two rows; a wave is a column of both, whatever parameters it holds or cuts.
While one is updated the next comes in and the one before goes out, so that copies run both ways at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from slime.backends.shared.offload import ALIGNMENT, HostBuffer

NAMES = ("exp_avg", "exp_avg_sq")
WAVE = 1 << 23  # values of a row: 32 MiB of each, which copies take at full speed
NUM_ROOMS = 3  # waves that are on the GPU at once: 192 MiB in all
_STEP = ALIGNMENT // torch.float32.itemsize  # where parameters begin: kernels see whole vectors, wherever they are cut

Update = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], None]
"""Of parameters, gradients, and both moments: overwrites all but the gradients."""


class Piece(NamedTuple):
    """Values `start:stop` of a parameter, which a wave has from `offset` on."""

    param: Tensor
    start: int
    stop: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its values of the parameter, or of a tensor of that shape."""
        return tensor.detach().view(-1)[self.start : self.stop]

    def of_row(self, row: Tensor) -> Tensor:
        """Its values of a row of the wave."""
        return row[self.offset : self.offset + self.stop - self.start]


class HostMoments:
    """Both moments of `params`, float32 tensors of one device; zero at first. Raises MemoryError for lack of room."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self._waves = _waves(params, WAVE)
        self._buffer = HostBuffer()
        num_values = sum(map(_reserved, params))
        rooms = self._buffer.rooms([num_values * torch.float32.itemsize] * len(NAMES))
        self._rows = [room.view(torch.float32) for room in rooms]
        self._width = min(WAVE, num_values)

    def states(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter with its moments, by name: views of the memory that is kept here."""
        start = 0
        for param in self.params:
            values = [row[start : start + param.numel()].view(param.shape) for row in self._rows]
            yield param, dict(zip(NAMES, values, strict=True))
            start += _reserved(param)

    @torch.no_grad()
    def update(self, update: Update) -> None:
        """Have `update` change parameters that have a gradient, and their moments. Waits until these are back.

        A wave is sent for before the one ahead of it is worked on: Megatron has one queue to the GPU, in which what
        follows an operation that waits does so too.
        """
        if not self._waves:
            return
        device, num_waves = self.params[0].device, len(self._waves)
        rooms = [torch.empty(len(NAMES), self._width, device=device) for _ in range(min(NUM_ROOMS, num_waves))]
        lanes = _Lanes(device)
        for number in range(num_waves + 1):
            if number < num_waves:
                with lanes.coming_in(number):
                    _copy(*self._host_and_room(number, rooms))
            if number > 0:
                host, room = self._host_and_room(number - 1, rooms)
                lanes.wait_for(number - 1)
                _update_pieces(self._waves[number - 1], room, update)
                with lanes.going_out():
                    _copy(room, host)
        lanes.finish()

    def _host_and_room(self, number: int, rooms: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The rows of a wave where they are kept, and on the device."""
        host = [row[number * self._width : (number + 1) * self._width] for row in self._rows]
        return host, [row[: len(host[0])] for row in rooms[number % NUM_ROOMS]]


def within(params: list[Tensor], share: float) -> list[Tensor]:
    """Of `params` those, large ones first, that together hold at most `share` of all values."""
    left, found = share * sum(param.numel() for param in params), []
    for param in sorted(params, key=Tensor.numel, reverse=True):
        if param.numel() <= left:
            found.append(param)
            left -= param.numel()
    return found


def _reserved(param: Tensor) -> int:
    return -(-param.numel() // _STEP) * _STEP


def _waves(params: list[Tensor], width: int) -> list[list[Piece]]:
    waves: list[list[Piece]] = [[] for _ in range(-(-sum(map(_reserved, params)) // width))]
    first = 0
    for param in params:
        place, last = first, first + param.numel()
        while place < last:
            number, offset = divmod(place, width)
            stop = min(last, (number + 1) * width)
            waves[number].append(Piece(param, place - first, stop - first, offset))
            place = stop
        first += _reserved(param)
    return waves


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)


def _update_pieces(pieces: list[Piece], room: list[Tensor], update: Update) -> None:
    found = [(piece, piece.of(piece.param.grad)) for piece in pieces if piece.param.grad is not None]
    if found:
        moments = [[piece.of_row(row) for piece, _ in found] for row in room]
        update([piece.of(piece.param) for piece, _ in found], [grad for _, grad in found], *moments)


class _Lanes:
    """What comes in, what works and what goes out: three streams of a GPU; on a CPU one thing after the other."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            self._work = torch.cuda.current_stream(device)
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._in.wait_stream(self._work)  # memory of the rooms may still be read by what had it before
            self._arrived: list[torch.cuda.Event] = []
            self._emptied: list[torch.cuda.Event] = []

    @contextlib.contextmanager
    def coming_in(self, number: int) -> Iterator[None]:
        """Copies of wave `number` to its room, once what it held is out."""
        if not self._is_cuda:
            yield
            return
        if number >= NUM_ROOMS:
            self._in.wait_event(self._emptied[number - NUM_ROOMS])
        with torch.cuda.stream(self._in):
            yield
        self._arrived.append(self._in.record_event())

    def wait_for(self, number: int) -> None:
        """Kernels that follow begin when wave `number` is in."""
        if self._is_cuda:
            self._work.wait_event(self._arrived[number])

    @contextlib.contextmanager
    def going_out(self) -> Iterator[None]:
        """Copies of the wave that was worked on last to the host."""
        if not self._is_cuda:
            yield
            return
        self._out.wait_stream(self._work)
        with torch.cuda.stream(self._out):
            yield
        self._emptied.append(self._out.record_event())

    def finish(self) -> None:
        """Wait for all of it: whoever reads the host's memory next asks no stream."""
        if self._is_cuda:
            self._out.synchronize()
