"""The engines and the router in front of them: started, given weights, watched, restarted.

An engine is registered with the router once it holds the policy's weights, not before: whatever the router reaches
samples from the current version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle

from slime.arguments import Args
from slime.engine.client import EngineClient
from slime.ray.actors import create_actor
from slime.ray.engine_command import EngineSpec, engine_command
from slime.ray.placement import Slots, stays_on_machine
from slime.ray.process_host import ProcessHost
from slime.ray.router import LIFE_SIGN_S, POLL_S, PortTaken, Router, ServerNotUp, not_up
from slime.ray.watchdog import thread_stacks
from slime.utils.http_utils import HTTPError
from slime.utils.logging import configure_logging

logger = logging.getLogger(__name__)

PORT_ATTEMPTS = 3
DEREGISTRATION_S = 5.0
KILLED = 128 + signal.SIGKILL  # the exit code of an engine whose owner died


class TooManyRestarts(RuntimeError):
    """Engines or router died more often than --max-engine-restarts allows."""


@dataclass
class Engine:
    """One engine: the actor that owns its process, the bundle where that runs, and where the engine listens now.

    lock: held while it is replaced or registered. is_lost: known to be gone, and not replaced yet.
    """

    name: str
    bundle: int
    host: ActorHandle
    url: str = ""
    num_starts: int = 0
    is_lost: bool = False
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
        self.is_loopback = stays_on_machine(args)
        host = "127.0.0.1" if self.is_loopback else ray.util.get_node_ip_address()
        self.router = Router(args, host=host, log_dir=self.log_dir)
        self.engines = [
            Engine(f"engine_{index}", bundle, self._create_host(bundle))
            for index, bundle in enumerate(slots.engine_bundles[:: args.rollout_num_gpus_per_engine])
        ]
        self.weights: Weights | None = None
        self.released: list[str] = []
        self.num_restarts = 0
        self.router_came_back = asyncio.Event()
        self.is_updating = False
        self.is_stopping = False

    def _create_host(self, bundle: int) -> ActorHandle:
        return create_actor(ProcessHost, str(self.log_dir), options=self.slots.options(bundle, "engine"))

    # --- start

    async def router_address(self) -> tuple[str, int]:
        """Where the router is, or will be."""
        return self.router.host, self.router.port

    async def start(self) -> None:
        """Start router and engines; returns when all answer. Raises ServerNotUp with the log of one that does not."""
        self.router.start()
        await asyncio.gather(self.router.wait_until_up(), *(self._start(engine) for engine in self.engines))

    async def _start(self, engine: Engine) -> None:
        """Start its process. A port that was free when chosen may be taken when it is bound: then on another one."""
        for _ in range(PORT_ATTEMPTS - 1):
            try:
                await self._start_once(engine)
            except PortTaken as error:
                logger.warning("%s", error)
            else:
                return
        await self._start_once(engine)

    async def _start_once(self, engine: Engine) -> None:
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
        while not await client.is_healthy(timeout_s=LIFE_SIGN_S):
            code = await self._poll(engine)
            if code is not None or time.monotonic() > deadline:
                raise not_up(engine.name, code, self.args.engine_start_timeout_s, await engine.host.log_tail.remote())
            await asyncio.sleep(POLL_S)

    async def _poll(self, engine: Engine) -> int | None:
        """Its exit code, or None while it runs. A host that died took the engine along; from here on it has another."""
        try:
            code: int | None = await engine.host.poll.remote()
        except ray.exceptions.RayActorError:
            logger.warning("the actor that owns %s died", engine.name)
            engine.host = self._create_host(engine.bundle)
            return KILLED
        return code

    def _client(self, engine: Engine) -> EngineClient:
        return EngineClient(engine.url, self.args.sglang_api_key)

    # --- weights and memory

    async def begin_update(self) -> list[str]:
        """Addresses of all engines, once none is being restarted; none will be until `weights_sent`."""
        self.is_updating = True
        for engine in self.engines:
            async with engine.lock:
                pass
        return [engine.url for engine in self.engines if not engine.is_lost]

    async def weights_sent(self, version: int, directory: str, failed: list[str]) -> None:
        """The engines hold `version`, but for the `failed` addresses, which are started anew from `directory`."""
        self.weights = Weights(version, directory)
        for engine in self.engines:
            engine.is_lost |= engine.url in failed
        await asyncio.gather(*(self._register(engine) for engine in self.engines if not engine.is_lost))
        await self._replace_lost()
        self.is_updating = False

    async def release_memory(self, tags: list[str]) -> None:
        """Engines give up the memory of "weights" and, or, "kv_cache"."""
        self.released = sorted({*self.released, *tags})
        await self._tell_all(lambda client: client.release_memory(tags))

    async def resume_memory(self, tags: list[str]) -> None:
        """Engines take that memory back. Those lost meanwhile are replaced once nobody else holds any of it."""
        await self._tell_all(lambda client: client.resume_memory(tags))
        self.released = [tag for tag in self.released if tag not in tags]
        await self._replace_lost()

    async def _tell_all(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        await asyncio.gather(*(self._tell(engine, call) for engine in self.engines if not engine.is_lost))

    async def _tell(self, engine: Engine, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        async with engine.lock:
            try:
                await call(self._client(engine))
            except HTTPError as error:
                if not error.is_lost:
                    raise
                logger.warning("%s is lost: %s", engine.name, error)
                engine.is_lost = True

    async def _replace_lost(self) -> None:
        """An engine that starts wants all its memory: it waits while trainers hold a part."""
        if not self.released:
            await asyncio.gather(*(self._replace(engine, engine.url) for engine in self.engines if engine.is_lost))

    # --- watch

    async def watch(self) -> None:
        """Look at every process until one cannot be brought back; that is raised, and is the only way to return."""
        await asyncio.gather(self._watch(self._look_at_router), *(self._watch(self._look_at, e) for e in self.engines))

    async def _watch(self, look: Callable[..., Awaitable[None]], *args: Engine) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.router_came_back.wait(), self.args.rollout_health_check_interval)
            if self.is_stopping:
                await asyncio.Event().wait()  # until the actor ends
            await look(*args)

    async def _look_at(self, engine: Engine) -> None:
        url = engine.url
        if self._is_busy(engine):
            return
        code = await self._poll(engine)
        if code is None and await self._client(engine).is_healthy(timeout_s=self.args.rollout_health_check_timeout):
            await self._keep_registered(engine)
            return
        if self._is_busy(engine):
            return
        reason = "does not answer /health" if code is None else f"ended with code {code}"
        logger.warning("%s %s: restarting it", engine.name, reason)
        await self._replace(engine, url)

    def _is_busy(self, engine: Engine) -> bool:
        """Whether somebody else sees to it, or nobody may: it sleeps, takes weights, is being replaced, or all ends."""
        return engine.lock.locked() or self.is_updating or bool(self.released) or self.is_stopping

    async def _replace(self, engine: Engine, url: str) -> None:
        """Replace the process that listens at `url`, which is gone; nothing if that has happened already."""
        async with engine.lock:
            if engine.url != url:
                return
            while not await self._comes_back(engine):
                pass
        logger.info("%s is back at %s", engine.name, engine.url)

    async def _comes_back(self, engine: Engine) -> bool:
        """Whether one restart was enough. Raises TooManyRestarts where there is none left."""
        self._count_restart(engine.name)
        try:
            await self.router.remove(engine.url)
        except HTTPError as error:
            logger.warning("the router keeps %s for now: %s", engine.url, error)
        try:
            await self._poll(engine)  # for a host that lives
            await self._start(engine)
            if self.weights is not None:
                await self.router.add(engine.url)
        except (ServerNotUp, HTTPError, ray.exceptions.RayActorError) as error:
            logger.warning("%s did not come back: %s", engine.name, error)
            return False
        engine.is_lost = False
        return True

    async def _register(self, engine: Engine) -> None:
        async with engine.lock:
            if engine.url not in await self.router.workers():
                await self.router.add(engine.url)

    async def _keep_registered(self, engine: Engine) -> None:
        """Register it with a router that has forgotten it; the next look tries again where that fails."""
        if self.weights is None or self._is_busy(engine):
            return
        try:
            await self._register(engine)
        except (ServerNotUp, HTTPError) as error:
            logger.warning("%s is not registered for now: %s", engine.name, error)

    async def _look_at_router(self) -> None:
        if self.router.is_external or self.is_stopping or await self.router.is_up() or self.is_stopping:
            return
        logger.warning("the router does not answer: restarting it")
        self._count_restart("the router")
        await asyncio.to_thread(self.router.stop)
        self.router.start()
        await self.router.wait_until_up()
        logger.info("the router is back")
        self.router_came_back.set()  # the watch on each engine registers it
        self.router_came_back = asyncio.Event()

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
        self.is_stopping = True
        if self.router.is_external:
            removals = asyncio.gather(*(self.router.remove(e.url) for e in self.engines), return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(removals, DEREGISTRATION_S)
        await asyncio.gather(
            asyncio.to_thread(self.router.stop),
            *(engine.host.stop.remote() for engine in self.engines),
            return_exceptions=True,  # a host that is gone took its engine along
        )

    async def stacks(self) -> str:
        """What every thread and every task is doing."""
        return thread_stacks()
