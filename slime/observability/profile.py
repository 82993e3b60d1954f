"""Traces of phases, and the history of a GPU's memory, for looking into where time and memory go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from slime.observability.timer import PhaseTimer

PHASES_OF_TARGETS: dict[str, tuple[str, ...]] = {
    "train_overall": ("train",),
    "train_actor": ("actor_train",),
    "train_log_probs": ("log_probs", "ref_log_probs", "teacher_log_probs"),
}
_MEMORY_EVENTS = 1_000_000  # allocations and frees that are kept: some 200 bytes each


class PhaseProfiler:
    """Times phases, and of those that are meant writes what torch.profiler saw, for https://ui.perfetto.dev.

    targets: keys of `PHASES_OF_TARGETS`. rollouts: which are traced. folder: of `PHASE_ROLLOUT_RANK.json.gz`.
    """

    def __init__(self, timer: PhaseTimer, folder: Path, *, targets: Sequence[str], rollouts: range, rank: int) -> None:
        self._timer = timer
        self._folder = folder
        self._phases = {phase for target in targets for phase in PHASES_OF_TARGETS[target]}
        self._rollouts = rollouts
        self._rank = rank
        self._is_tracing = False  # torch traces one thing at a time: a phase inside one is part of its trace

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As `PhaseTimer.phase`."""
        wanted = name in self._phases and self._timer.rollout_id in self._rollouts and not self._is_tracing
        with self._timer.phase(name), self._traced(name) if wanted else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _traced(self, name: str) -> Iterator[None]:
        self._is_tracing = True
        try:
            with torch.profiler.profile() as trace:
                yield
        finally:
            self._is_tracing = False
        self._folder.mkdir(parents=True, exist_ok=True)
        file = f"{name}_{self._timer.rollout_id:06d}_rank_{self._rank:04d}.json.gz"
        trace.export_chrome_trace(str(self._folder / file))


class MemoryHistory:
    """Every allocation on this process's GPU from now on, with its stack, for https://pytorch.org/memory_viz.

    Written when the GPU's memory runs out, and after `num_steps` rollouts. Raises ValueError where there is no GPU.
    """

    def __init__(self, folder: Path, *, rank: int, num_steps: int | None) -> None:
        if not torch.cuda.is_available():
            raise ValueError("--record-memory-history is of a GPU's memory, and there is none: drop it")
        self._folder = folder
        self._rank = rank
        self._num_left = num_steps
        torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        attach = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]  # in builds for GPUs
        attach(lambda *_: self._dump("out_of_memory"))

    def trained(self, rollout_id: int) -> None:
        """After each rollout."""
        if self._num_left is not None:
            self._num_left -= 1
            if self._num_left == 0:
                self._dump(f"rollout_{rollout_id:06d}")

    def _dump(self, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}_rank_{self._rank:04d}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
