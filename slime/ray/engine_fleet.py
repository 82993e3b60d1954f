"""The engines and the router in front of them: started, given weights, watched, restarted.

An engine is registered with the router once it holds the policy's weights, not before: whatever the router reaches
samples from the current version.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle

from slime.arguments import Args
from slime.engine.client import EngineClient
from slime.ray.actors import create_actor
from slime.ray.engine_command import EngineSpec, engine_command
from slime.ray.placement import Slots
from slime.ray.process_host import ProcessHost
from slime.ray.router import POLL_S, Router, ServerNotUp
from slime.ray.watchdog import thread_stacks
from slime.utils.http_utils import HTTPError
from slime.utils.logging import configure_logging

logger = logging.getLogger(__name__)


class TooManyRestarts(RuntimeError):
    """Engines or router died more often than --max-engine-restarts allows."""


@dataclass
class Engine:
    """One engine: the actor that owns its process, and where it listens now."""

    name: str
    host: ActorHandle
    url: str = ""
    num_starts: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class Weights:
    """The version that engines must hold, and a directory to start them from."""

    version: int
    directory: str


class EngineFleet:
    """An asyncio actor: `watch` runs for as long as the fleet does, the other calls beside it."""

    def __init__(self, args: Args, slots: Slots, run_dir: str) -> None:
        configure_logging(args.log_level)
        self.args = args
        self.slots = slots
        self.log_dir = Path(run_dir) / "logs"
        self.is_loopback = len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 1
        host = "127.0.0.1" if self.is_loopback else ray.util.get_node_ip_address()
        self.router = Router(args, host=host, log_dir=self.log_dir)
        self.engines = [self._create(index, bundle) for index, bundle in enumerate(self._first_bundles())]
        self.weights: Weights | None = None
        self.released: list[str] = []
        self.num_restarts = 0
        self.is_updating = False

    def _first_bundles(self) -> list[int]:
        return self.slots.engine_bundles[:: self.args.rollout_num_gpus_per_engine]

    def _create(self, index: int, bundle: int) -> Engine:
        host = create_actor(ProcessHost, str(self.log_dir), options=self.slots.options(bundle, "engine"))
        return Engine(f"engine_{index}", host)

    # --- start

    async def router_address(self) -> tuple[str, int]:
        """Where the router is, or will be."""
        return self.router.host, self.router.port

    async def start(self) -> None:
        """Start router and engines; returns when all answer. Raises ServerNotUp with the log of the one that does not."""
        self.router.start()
        await asyncio.gather(self.router.wait_until_up(), *(self._start(engine) for engine in self.engines))

    async def _start(self, engine: Engine) -> None:
        weights = self.weights
        spec = EngineSpec(
            model_path=weights.directory if weights else self.args.hf_checkpoint,
            weight_version=str(weights.version) if weights else "default",
            num_threads=self.args.num_threads or max(1, (os.cpu_count() or 1) // len(self.engines)),
            device=self.slots.device,
        )
        engine.num_starts += 1
        name = f"{engine.name}_start_{engine.num_starts}"
        command = engine_command(self.args, spec)
        engine.url = await engine.host.start.remote(name, command, {}, loopback=self.is_loopback)
        await self._wait_until_up(engine)

    async def _wait_until_up(self, engine: Engine) -> None:
        deadline = time.monotonic() + self.args.engine_start_timeout_s
        client = self._client(engine)
        while not await client.is_healthy(timeout_s=self.args.rollout_health_check_timeout):
            code = await engine.host.poll.remote()
            if code is not None or time.monotonic() > deadline:
                state = f"ended with code {code}" if code is not None else "did not answer /health in time"
                raise ServerNotUp(f"{engine.name} {state}. Its log ends:\n{await engine.host.log_tail.remote()}")
            await asyncio.sleep(POLL_S)

    def _client(self, engine: Engine) -> EngineClient:
        return EngineClient(engine.url, self.args.sglang_api_key)

    # --- weights and memory

    async def begin_update(self) -> list[str]:
        """Addresses of all engines, once none is being restarted; none will be until `weights_sent`."""
        self.is_updating = True
        for engine in self.engines:
            async with engine.lock:
                pass
        return [engine.url for engine in self.engines]

    async def weights_sent(self, version: int, directory: str, failed: list[str]) -> None:
        """The engines hold `version`, but for the `failed` addresses, which are restarted from `directory`."""
        self.weights = Weights(version, directory)
        await asyncio.gather(*(self._restart(engine, engine.url) for engine in self.engines if engine.url in failed))
        await asyncio.gather(*(self._register(engine) for engine in self.engines))
        self.is_updating = False

    async def _register(self, engine: Engine) -> None:
        if engine.url not in await self.router.workers():
            await self.router.add(engine.url)

    async def release_memory(self, tags: list[str]) -> None:
        """Engines give up the memory of "weights" and, or, "kv_cache"."""
        await asyncio.gather(*(self._client(engine).release_memory(tags) for engine in self.engines))
        self.released = sorted({*self.released, *tags})

    async def resume_memory(self, tags: list[str]) -> None:
        """Engines take that memory back."""
        await asyncio.gather(*(self._client(engine).resume_memory(tags) for engine in self.engines))
        self.released = [tag for tag in self.released if tag not in tags]

    # --- watch

    async def watch(self) -> None:
        """Look at every process until one cannot be brought back; that is raised, and is the only way to return."""
        while True:
            await asyncio.sleep(self.args.rollout_health_check_interval)
            await asyncio.gather(self._look_at_router(), *(self._look_at(engine) for engine in self.engines))

    async def _look_at(self, engine: Engine) -> None:
        url = engine.url
        if engine.lock.locked() or self.is_updating:
            return
        code = await engine.host.poll.remote()
        if code is None and await self._client(engine).is_healthy(timeout_s=self.args.rollout_health_check_timeout):
            return
        reason = "does not answer /health" if code is None else f"ended with code {code}"
        logger.warning("%s %s: restarting it", engine.name, reason)
        await self._restart(engine, url)
        if self.weights is not None:
            await self._register(engine)

    async def _restart(self, engine: Engine, url: str) -> None:
        """Replace the process that listens at `url`; nothing if that has happened already."""
        async with engine.lock:
            if engine.url != url:
                return
            self._count_restart(engine.name)
            try:
                await self.router.remove(url)
            except HTTPError as error:
                logger.warning("the router keeps %s for now: %s", url, error)
            await self._start(engine)
            if self.released:
                await self._client(engine).release_memory(self.released)

    async def _look_at_router(self) -> None:
        if self.router.is_external or await self.router.is_up():
            return
        logger.warning("the router does not answer: restarting it")
        self._count_restart("the router")
        self.router.stop()
        self.router.start()
        await self.router.wait_until_up()
        if self.weights is not None:
            await asyncio.gather(*(self._register(engine) for engine in self.engines))

    def _count_restart(self, name: str) -> None:
        if not self.args.use_fault_tolerance:
            raise TooManyRestarts(f"{name} died and --no-use-fault-tolerance forbids restarts; see {self.log_dir}")
        self.num_restarts += 1
        if self.num_restarts > self.args.max_engine_restarts:
            raise TooManyRestarts(
                f"{name} died; restarts are used up (--max-engine-restarts {self.args.max_engine_restarts}). "
                f"Logs: {self.log_dir}"
            )

    # --- end

    async def stop(self) -> None:
        """End engines and router; take our engines out of an external router."""
        if self.router.is_external:
            await asyncio.gather(*(self.router.remove(engine.url) for engine in self.engines), return_exceptions=True)
        self.router.stop()
        await asyncio.gather(*(engine.host.stop.remote() for engine in self.engines))

    async def stacks(self) -> str:
        """What every thread is doing."""
        return thread_stacks()
