"""The driver's one display: what runs now, how far the run is, how well it learns, and what it waits for.

On a terminal a few lines that stay at the bottom, log lines scrolling above them. Elsewhere one line per rollout, and
a line at most every 30 s while one phase lasts.

    rollout 12/40   reward 0.412   held-out 0.610   length 38   tok/s 1,840   step 4.2 s   ETA 1:58
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, TextIO, cast

from slime.observability.metrics import eval_names

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WAITING_AFTER_S = 10.0  # a phase that takes longer is shown as one that is waited for
WAITING_LINE_EVERY_S = 30.0
_BARS = "▁▂▃▄▅▆▇█"


class _Phase(NamedTuple):
    name: str
    waiting_for: str
    since: float


class Progress:
    """State and life-cycle of the display; a context manager.

    num_rollout: the rollout id at which the run ends; None where `begin` tells. start_rollout_id: the first one of this
    session.
    """

    def __init__(
        self,
        num_rollout: int | None = None,
        *,
        start_rollout_id: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if console is None:
            from rich.console import Console

            console = Console(stderr=True)
        self._console = console
        self._clock = clock
        self._num_rollout = num_rollout
        self._num_done = start_rollout_id
        self._started = self._last_update = clock()
        self._step_seconds: deque[float] = deque(maxlen=10)
        self._latest: dict[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=16)
        self._phases: list[_Phase] = []  # innermost last
        self._last_line = self._started
        self._lock = threading.RLock()
        self._resources = ExitStack()

    def begin(self, start_rollout_id: int, num_rollout: int) -> None:
        """From here on it is known which rollouts there are."""
        with self._lock:
            self._num_done, self._num_rollout = start_rollout_id, num_rollout

    def begin_step(self) -> None:
        """A rollout begins: time counts for it from here on, else from the end of the one before."""
        with self._lock:
            self._last_update = self._clock()

    @contextmanager
    def phase(self, name: str, waiting_for: str | None = None) -> Iterator[None]:
        """Show `name` while the block runs; after 10 s as "waiting for `waiting_for`" (default: the name)."""
        entry = _Phase(name, waiting_for or name, self._clock())
        with self._lock:
            self._phases.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._phases.remove(entry)

    def update(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Rollout `rollout_id` is done; show what is known of it. Keys as in `rollout/*`, `perf/*`, `eval/*`."""
        now = self._clock()
        with self._lock:
            self._latest.update(metrics)
            if "rollout/raw_reward" in metrics:
                self._rewards.append(metrics["rollout/raw_reward"])
            self._num_done = rollout_id + 1
            self._step_seconds.append(now - self._last_update)
            self._last_update = self._last_line = now
        if not self._console.is_terminal:
            parts = [self._count_text(), *self._facts(), *self._time_left()]
            self._print_line("   ".join(parts))

    def note(self, metrics: Mapping[str, float]) -> None:
        """Take in metrics that are no rollout of their own, such as those of an evaluation."""
        with self._lock:
            self._latest.update(metrics)

    def tick(self) -> None:
        """Print a waiting line where one is due and the display is no terminal."""
        now = self._clock()
        with self._lock:
            if not self._phases or now - max(self._last_line, self._phases[-1].since) < WAITING_LINE_EVERY_S:
                return
            self._last_line = now
            line = self._phase_text()
        self._print_line(line)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._enter_live()
        else:
            stop = threading.Event()
            thread = threading.Thread(target=self._tick_until, args=(stop,), name="progress", daemon=True)
            thread.start()
            self._resources.callback(thread.join)
            self._resources.callback(stop.set)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._resources.close()

    def _enter_live(self) -> None:
        from rich.live import Live

        self._resources.enter_context(_logging_above(self._console))
        live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4)
        self._resources.enter_context(live)  # takes over sys.stdout and sys.stderr

    def _tick_until(self, stop: threading.Event) -> None:
        while not stop.wait(1.0):
            self.tick()

    def _print_line(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """The lines of the terminal display."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            elapsed = f"{_clock_text(self._clock() - self._started)} elapsed"
            head = Table.grid(padding=(0, 2))
            head.add_row(
                Text(self._count_text(), style="bold", no_wrap=True),
                ProgressBar(total=self._num_rollout, completed=self._num_done, width=20),
                Text("  ".join([elapsed, *self._time_left()]), style="dim", no_wrap=True),
                Text(sparkline(list(self._rewards)), style="green", no_wrap=True),
            )
            phase = Text(self._phase_text(), style="yellow" if self._is_waiting() else "cyan", no_wrap=True)
            facts = Text("   ".join(self._facts()), no_wrap=True, overflow="ellipsis")
        return Group(head, phase, facts)

    def _count_text(self) -> str:
        return "starting" if self._num_rollout is None else f"rollout {self._num_done}/{self._num_rollout}"

    def _is_waiting(self) -> bool:
        return bool(self._phases) and self._clock() - self._phases[-1].since >= WAITING_AFTER_S

    def _phase_text(self) -> str:
        if not self._phases:
            return "starting" if not self._latest else ""
        name, waiting_for, since = self._phases[-1]
        return f"waiting for {waiting_for} ({self._clock() - since:.0f} s)" if self._is_waiting() else name

    def _facts(self) -> list[str]:
        """What is known of the run, in short; only what has been reported."""
        evals = eval_names(self._latest)
        shown = [
            ("rollout/raw_reward", "reward", ".3f"),
            *((f"eval/{name}", "held-out" if len(evals) == 1 else f"held-out {name}", ".3f") for name in evals),
            ("rollout/response_len/mean", "length", ".0f"),
            ("perf/tokens_per_sec", "tok/s", ",.0f"),
        ]
        facts = [f"{label} {self._latest[key]:{form}}" for key, label, form in shown if key in self._latest]
        if self._step_seconds:
            facts.append(f"step {self._step_seconds[-1]:.1f} s")
        return facts

    def _time_left(self) -> list[str]:
        """The estimate from the last ten steps; none before the first."""
        if not self._step_seconds:
            return []
        num_left = max(0, (self._num_rollout or 0) - self._num_done)
        return [f"ETA {_clock_text(statistics.median(self._step_seconds) * num_left)}"]


def sparkline(values: list[float]) -> str:
    """One bar a value, from the least to the greatest of them; a space where a value is NaN."""
    present = [value for value in values if value == value]
    low, high = min(present, default=0.0), max(present, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if value == value else " " for value in values)


def _clock_text(seconds: float) -> str:
    """`95 -> "1:35"`, `3700 -> "1:01:40"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def _logging_above(console: Console) -> Iterator[None]:
    """Send what the root logger's handlers write to stdout and stderr through the console, above the live lines."""
    from rich.file_proxy import FileProxy

    restored: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr):
            restored.append((handler, handler.stream))
            handler.setStream(cast(TextIO, FileProxy(console, handler.stream)))
    try:
        yield
    finally:
        for handler, stream in restored:
            handler.flush()
            handler.setStream(stream)
