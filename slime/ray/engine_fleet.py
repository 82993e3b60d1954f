"""The engines and the routers in front of them: started, given weights, watched, restarted.

An engine of the policy is registered with its router once it holds the policy's weights, not before: whatever the
router reaches samples from the current version. Engines of other models (--sglang-config) keep their own weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import ray
from ray.actor import ActorHandle

from slime.arguments import Args
from slime.engine.client import EngineClient, EngineError
from slime.engine.spec import EngineCommand, EngineSpec
from slime.ray.actors import create_actor
from slime.ray.current_weights import CurrentWeights, WeightFiles
from slime.ray.engine_command import engine_client, engine_commands
from slime.ray.engines import Engine, create_engines
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


class EngineFleet:
    """An asyncio actor: `watch` runs for as long as the fleet does, the other calls beside it."""

    def __init__(self, args: Args, slots: Slots, run_dir: str) -> None:
        configure_logging(args.log_level)
        self.args = args
        self.slots = slots
        self.log_dir = Path(run_dir) / "logs"
        self.is_loopback = stays_on_machine(args)
        host = "127.0.0.1" if self.is_loopback else ray.util.get_node_ip_address()
        self.routers = {
            model.name: Router(args, host=host, log_dir=self.log_dir, model=model) for model in args.served_models
        }
        self.engines = create_engines(args, slots, self._create_host)
        self.policy_engines = [engine for engine in self.engines if not engine.is_frozen]
        self.weights = CurrentWeights()
        self.released: list[str] = []
        self.num_restarts = 0
        self.router_came_back = asyncio.Event()
        self.is_updating = False
        self.is_stopping = False

    def _create_host(self, bundle: int) -> ActorHandle:
        return create_actor(ProcessHost, str(self.log_dir), options=self.slots.options(bundle, "engine"))

    # --- start

    async def router_addresses(self) -> dict[str, tuple[str, int]]:
        """Where the router of each model, by its name, is or will be."""
        return {name: (router.host, router.port) for name, router in self.routers.items()}

    async def start(self) -> None:
        """Start routers and engines; returns when all answer. Raises ServerNotUp with the log of one that does not."""
        routers = self.routers.values()
        for router in routers:
            router.start()
        await asyncio.gather(*(router.wait_until_up() for router in routers), *map(self._start, self.engines))
        await asyncio.gather(*(self._register(engine) for engine in self.engines if engine.is_frozen))

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
        if engine.is_external:
            await self._wait_until_up(engine)
            await self._give_weights(engine)
            return
        engine.num_starts += 1
        name = f"{engine.name}_start_{engine.num_starts}"
        head = await engine.hosts[0].free_address.remote() if len(engine.hosts) > 1 else ""
        if engine.role == "prefill":
            engine.bootstrap_port = int((await engine.hosts[0].free_address.remote()).rpartition(":")[2])
        names = [name, *(f"{name}_node_{rank}" for rank in range(1, len(engine.hosts)))]
        starts = [
            host.start.remote(log, command, loopback=self.is_loopback, head=head)
            for log, host, command in zip(names, engine.hosts, await self._commands(engine), strict=True)
        ]
        engine.url, *_ = await asyncio.gather(*starts)
        await self._wait_until_up(engine)

    async def _commands(self, engine: Engine) -> list[EngineCommand]:
        has_moved = not engine.is_frozen and self.weights.version is not None
        files = await self._weight_files() if has_moved else None
        spec = EngineSpec(
            index=engine.index,
            model_path=engine.model.model_path if files is None else files.directory,
            weight_version="default" if files is None else str(files.version),
            num_threads=self.args.num_threads or max(1, (os.cpu_count() or 1) // len(self.engines)),
            device=self.slots.device,
            num_slots=engine.group.num_gpus_per_engine,
            num_nodes=len(engine.nodes),
            role=engine.role,
            bootstrap_port=engine.bootstrap_port,
            is_frozen=engine.is_frozen,
            overrides=engine.group.overrides,
        )
        if not engine.environments:
            engine.environments = [await self._environment(node) for node in engine.nodes]
        commands = engine_commands(self.args, spec)
        return [
            EngineCommand(command.argv, command.env | environment)
            for command, environment in zip(commands, engine.environments, strict=True)
        ]

    async def _environment(self, bundles: list[int]) -> dict[str, str]:
        """Ray shows the process's actor one GPU; an engine of several slots is shown those of all its bundles."""
        if self.slots.device != "cuda" or len(bundles) == 1:
            return {}
        return {"CUDA_VISIBLE_DEVICES": await self.slots.gpu_ids(bundles)}

    async def _give_weights(self, engine: Engine) -> None:
        """The current weights for an external engine that came back with others."""
        if self.weights.version is not None:
            version, directory = await self._weight_files()
            timeout_s = self.args.weight_sync_timeout_s
            await self._client(engine).update_weights_from_disk(directory, version=version, timeout_s=timeout_s)

    async def _wait_until_up(self, engine: Engine) -> None:
        deadline = time.monotonic() + self.args.engine_start_timeout_s
        client = self._client(engine)
        while not await client.is_healthy(timeout_s=LIFE_SIGN_S):
            code = await self._poll(engine)
            if code is not None or time.monotonic() > deadline:
                tails: list[str] = await asyncio.gather(*(host.log_tail.remote() for host in engine.hosts))
                log_tail = "\n".join(tails) if tails else "(--rollout-external-engine-addrs: not ours)"
                raise not_up(engine.name, code, self.args.engine_start_timeout_s, log_tail)
            await asyncio.sleep(POLL_S)
        engine.up_since = time.monotonic()

    async def _poll(self, engine: Engine) -> int | None:
        """Its exit code, that of any of its nodes, or None while it runs; nobody knows that of an external one.

        A host that died took the engine along; from here on it has another.
        """
        codes: list[int | None] = []
        for rank, host in enumerate(engine.hosts):
            try:
                codes.append(await host.poll.remote())
            except ray.exceptions.RayActorError:
                logger.warning("the actor that owns %s died", engine.name)
                engine.hosts[rank] = self._create_host(engine.nodes[rank][0])
                codes.append(KILLED)
        return next((code for code in codes if code is not None), None)

    def _client(self, engine: Engine) -> EngineClient:
        return engine_client(self.args, engine.url)

    # --- weights and memory

    async def begin_update(self) -> list[str | None]:
        """The policy's engines (None: lost) once none is being restarted; none of them will be until `weights_sent`."""
        self.is_updating = True
        for engine in self.policy_engines:
            async with engine.lock:
                pass
        return [None if engine.is_lost else engine.url for engine in self.policy_engines]

    async def _weight_files(self) -> WeightFiles:
        timeout_s = self.args.train_timeout_s + self.args.weight_sync_timeout_s  # trainers may be in the middle of it
        return await self.weights.files(timeout_s=timeout_s)

    async def weights_wanted(self) -> int:
        """Returns a version that lies in no file, once an engine is to be started with it."""
        return await self.weights.wanted()

    async def weights_written(self, version: int, files: WeightFiles) -> None:
        """They lie in `files` now."""
        self.weights.written(version, files)

    async def weights_sent(self, version: int, directory: str | None, failed: list[str]) -> None:
        """The policy's engines hold `version`, but for the `failed`, which are started anew from `directory`."""
        self.weights.set(version, directory)
        for engine in self.policy_engines:
            engine.is_lost |= engine.url in failed
        await asyncio.gather(*(self._register(engine) for engine in self.policy_engines if not engine.is_lost))
        await self._replace_lost()
        self.is_updating = False

    async def release_memory(self, tags: list[str]) -> None:
        """Engines give up the memory of "weights" and, or, "kv_cache"."""
        self.released = sorted({*self.released, *tags})
        await self._tell_all(lambda client: client.release_memory(tags))

    async def resume_memory(self, tags: list[str]) -> None:
        """Engines take that memory back. Those lost meanwhile are replaced once nobody else holds any of it."""
        held_by_others = [tag for tag in tags if tag in self.released]
        if held_by_others:  # else, as before the first rollout, there is nothing to take: SGLang would end itself
            await self._tell_all(lambda client: client.resume_memory(held_by_others))
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
        routers = (self._watch(self._look_at_router, router) for router in self.routers.values())
        await asyncio.gather(*routers, *(self._watch(self._look_at, engine) for engine in self.engines))

    async def _watch(self, look: Callable[..., Awaitable[None]], *args: Engine | Router) -> None:
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
        if code is None and (self._may_hang(engine) or await self._is_healthy(engine)):
            await self._keep_registered(engine)
            return
        if self._is_busy(engine):
            return
        reason = "does not answer /health" if code is None else f"ended with code {code}"
        logger.warning("%s %s: %s", engine.name, reason, "waiting for it" if engine.is_external else "restarting it")
        await self._replace(engine, url)

    def _may_hang(self, engine: Engine) -> bool:
        return time.monotonic() - engine.up_since < self.args.rollout_health_check_first_wait

    async def _is_healthy(self, engine: Engine) -> bool:
        return await self._client(engine).is_healthy(timeout_s=self.args.rollout_health_check_timeout)

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
            await self._router(engine).remove(engine.url)
        except HTTPError as error:
            logger.warning("the router keeps %s for now: %s", engine.url, error)
        try:
            await self._poll(engine)  # for a host that lives
            await self._start(engine)
            if self._may_serve(engine):
                await self._add(engine)
        except (ServerNotUp, HTTPError, EngineError, ray.exceptions.RayActorError) as error:
            logger.warning("%s did not come back: %s", engine.name, error)
            return False
        engine.is_lost = False
        return True

    async def _register(self, engine: Engine) -> None:
        async with engine.lock:
            if engine.url not in await self._router(engine).workers():
                await self._add(engine)

    async def _add(self, engine: Engine) -> None:
        await self._router(engine).add(engine.url, role=engine.role, bootstrap_port=engine.bootstrap_port)

    async def _keep_registered(self, engine: Engine) -> None:
        """Register it with a router that has forgotten it; the next look tries again where that fails."""
        if not self._may_serve(engine) or self._is_busy(engine):
            return
        try:
            await self._register(engine)
        except (ServerNotUp, HTTPError) as error:
            logger.warning("%s is not registered for now: %s", engine.name, error)

    def _router(self, engine: Engine) -> Router:
        return self.routers[engine.model.name]

    def _may_serve(self, engine: Engine) -> bool:
        """Whether it holds weights to sample from: the policy's have been sent once, another model has its own."""
        return engine.is_frozen or self.weights.version is not None

    async def _look_at_router(self, router: Router) -> None:
        if router.is_external or self.is_stopping or await router.is_up() or self.is_stopping:
            return
        logger.warning("the %s does not answer: restarting it", router.name)
        self._count_restart(f"the {router.name}")
        await asyncio.to_thread(router.stop)
        router.start()
        await router.wait_until_up()
        logger.info("the %s is back", router.name)
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
        """End our engines and routers; take our engines out of an external router."""
        self.is_stopping = True
        ours = [engine for engine in self.engines if self._router(engine).is_external and not engine.is_external]
        if ours:
            calls = (self._router(engine).remove(engine.url) for engine in ours)
            removals = asyncio.gather(*calls, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(removals, DEREGISTRATION_S)
        await asyncio.gather(
            *(asyncio.to_thread(router.stop) for router in self.routers.values()),
            *(host.stop.remote() for engine in self.engines for host in engine.hosts),
            return_exceptions=True,  # a host that is gone took its engine along
        )

    async def stacks(self) -> str:
        """What every thread and every task is doing."""
        return thread_stacks()
