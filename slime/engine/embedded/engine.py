"""The engine's thread: takes requests and commands from the server, steps the scheduler, reports what came out."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.model_runner import ModelRunner
from slime.engine.embedded.request import Request
from slime.engine.embedded.scheduler import Scheduler
from slime.engine.embedded.weights import ModelWeights

logger = logging.getLogger(__name__)

PauseMode = Literal["abort", "retract", "in_place"]
Result = TypeVar("Result")


class EngineUnavailable(Exception):
    """The engine cannot serve now; the message says what it waits for."""


class Engine:
    """A model, its scheduler and its weights, all touched by one thread only, which `call` hands work to.

    report: called in the engine's thread with the requests that have news. crashed: called there if the thread dies.
    """

    def __init__(
        self, args: ServerArgs, *, report: Callable[[list[Request]], None], crashed: Callable[[], None]
    ) -> None:
        self._report, self._crashed = report, crashed
        self.runner = ModelRunner(args)
        self.weights = ModelWeights(self.runner.model, args.model_path)
        self.scheduler = Scheduler(
            self.runner,
            max_running=args.max_running_requests,
            chunk_size=args.chunked_prefill_size,
            reuse_prefixes=not args.disable_radix_cache,
        )
        self.scheduler.weight_version = args.weight_version
        self.is_paused = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._busy_since: float | None = None
        self._watchdog_timeout_s = args.watchdog_timeout
        self._min_step_s = args.min_step_ms / 1000
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; their listeners hear of them. Raises EngineUnavailable while memory is released."""
        self.check_available()
        self._commands.put(lambda: self._add(requests))

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Runs `function` in the engine's thread between two steps."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # handed to the caller, who waits for it
                future.set_exception(error)

        self._commands.put(run)
        return future

    async def run(self, function: Callable[[], Result]) -> Result:
        """As `call`, awaited by the server."""
        return await asyncio.wrap_future(self.call(function))

    def check_available(self) -> None:
        """Raises EngineUnavailable while weights or cache are released."""
        if not self.runner.cache.has_memory:
            raise EngineUnavailable("the key-value cache is released; POST /resume_memory_occupation first")
        reason = self.weights.reason_unusable()
        if reason is not None:
            raise EngineUnavailable(reason)

    def check_alive(self, now: float) -> None:
        """Raises EngineUnavailable if one step or command takes the thread too long; now: of time.monotonic()."""
        since = self._busy_since
        if since is not None and now - since > self._watchdog_timeout_s:
            raise EngineUnavailable(
                f"the engine's thread is stuck: one step or command has taken {now - since:.0f} s, "
                f"--watchdog-timeout allows {self._watchdog_timeout_s:g} s"
            )

    # commands, run in the engine's thread

    def abort(self, rid: str, *, all_requests: bool = False) -> None:
        """Ends the request `rid`, the samples `rid_0`, `rid_1`, ... of one, or all."""
        scheduler = self.scheduler
        chosen = [
            request
            for request in [*scheduler.running, *scheduler.waiting]
            if all_requests or request.rid == rid or request.rid.rpartition("_")[0] == rid
        ]
        scheduler.abort(chosen, "Aborted by request.")

    def pause(self, mode: PauseMode) -> None:
        """Stops generation: what runs ends (abort), queues without its memory (retract), or stays (in_place)."""
        self.is_paused = True
        if mode == "abort":
            self.abort("", all_requests=True)
        elif mode == "retract":
            self.scheduler.retract_all()

    def resume(self) -> None:
        """Lets generation go on."""
        self.is_paused = False

    def flush_cache(self) -> bool:
        """Forgets all prefixes; False, and nothing done, while requests run or wait, unless generation is paused."""
        if self.scheduler.has_work and not self.is_paused:
            return False
        self.scheduler.forget_cache()
        return True

    def update_weights(self, change: Callable[[], None], *, version: str | None, abort_all: bool) -> None:
        """Applies `change` to the weights, names them, and makes all keys and values invalid."""
        if abort_all:
            self.abort("", all_requests=True)
        change()
        self.scheduler.forget_cache()
        if version is not None:
            self.scheduler.weight_version = version

    def release_memory(self, tags: set[str]) -> None:
        """Frees the memory of weights and cache. Raises EngineUnavailable while requests run and nothing is paused."""
        if self.scheduler.has_work and not self.is_paused:
            raise EngineUnavailable("requests are running: pause generation or wait for them before memory is released")
        self.scheduler.forget_cache()
        if "kv_cache" in tags:
            self.runner.cache.release_memory()
        if "weights" in tags:
            self.weights.release()

    def resume_memory(self, tags: set[str]) -> None:
        """Takes the memory again; weights must be updated, or are read again from disk when first needed."""
        if "weights" in tags:
            self.weights.resume()
        if "kv_cache" in tags and not self.runner.cache.has_memory:
            self.runner.cache.allocate_memory()

    # the thread

    def _add(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.add(request)

    @property
    def _can_step(self) -> bool:
        return self.scheduler.has_work and not self.is_paused and self.runner.cache.has_memory

    def _run(self) -> None:
        self.runner.set_threads()
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._run_commands()
                    if self._can_step:
                        self._busy_since = time.monotonic()
                        self._step()
                    if news := self.scheduler.take_news():
                        self._report(news)
        finally:
            if not self._stopping:
                logger.critical("the engine's thread died", exc_info=True)
                self.scheduler.fail_all("the engine's thread died; its log has the traceback")
                self._report(self.scheduler.take_news())
                self._crashed()

    def _run_commands(self) -> None:
        must_wait = not self._can_step
        while True:
            self._busy_since = None
            try:
                command = self._commands.get(block=must_wait)
            except queue.Empty:
                return
            self._busy_since = time.monotonic()
            command()
            must_wait = False

    def _step(self) -> None:
        ends_at = time.monotonic() + self._min_step_s
        try:
            self.weights.ensure_loaded()
            self.scheduler.step()
            time.sleep(max(0.0, ends_at - time.monotonic()))
        except (RuntimeError, MemoryError) as error:
            logger.exception("a step failed; its requests end with this error")
            self.scheduler.fail_all(f"{type(error).__name__}: {error}")
            self.scheduler.forget_cache()


def describe(engine: Engine) -> dict[str, Any]:
    """What the engine is doing, as numbers."""
    scheduler, cache = engine.scheduler, engine.runner.cache
    return {
        "num_running_reqs": len(scheduler.running),
        "num_waiting_reqs": len(scheduler.waiting),
        "num_used_tokens": scheduler.num_used_tokens,
        "num_cached_tokens": scheduler.num_cached_tokens,
        "max_total_num_tokens": cache.num_tokens,
        "kv_cache_bytes": cache.num_bytes if cache.has_memory else 0,
        "is_paused": engine.is_paused,
    }
