"""The sglang-router process and the engines registered with it."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from slime.arguments import Args
from slime.config.served_models import ServedModel
from slime.engine.spec import Role
from slime.ray.engine_command import router_command
from slime.utils.http_utils import HTTPError, delete, find_free_port, get, post
from slime.utils.processes import OwnedProcess

logger = logging.getLogger(__name__)

POLL_S = 0.1
LIFE_SIGN_S = 5.0  # for one answer while a server starts
EXTERNAL_DEADLINE_S = 10.0  # for a router that somebody else has started
API_RETRY_S = 60.0  # for an answer of the router's own API: longer than its restart
REGISTRATION_S = 60.0  # for the router to find a new engine healthy


class ServerNotUp(RuntimeError):
    """A server did not come up within its deadline; the message ends with its log."""


class PortTaken(ServerNotUp):
    """It ended because another process has its port."""


def not_up(name: str, code: int | None, timeout_s: float, log_tail: str) -> ServerNotUp:
    """The error for a server that ended with `code`, or (None) did not answer within `timeout_s`."""
    state = f"did not answer within {timeout_s:g} s" if code is None else f"ended with code {code}"
    kind = PortTaken if code is not None and "address already in use" in log_tail.lower() else ServerNotUp
    return kind(f"{name} {state}. Its log ends:\n{log_tail}")


class Router:
    """Our own router of one model, or an external one that is only talked to. model: the policy where none is given."""

    def __init__(self, args: Args, *, host: str, log_dir: Path, model: ServedModel | None = None) -> None:
        self.args = args
        self.model = model or args.policy
        self.name = "router" if self.model.update_weights else f"router_{self.model.name}"
        self.is_external = args.sglang_router_ip is not None
        self.host = args.sglang_router_ip or host
        self.port = args.sglang_router_port or find_free_port(host)
        self.log_dir = log_dir
        self.process: OwnedProcess | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start the process, on the same port each time; nothing for an external router."""
        if self.is_external:
            return
        command = router_command(
            self.args,
            host=self.host,
            port=self.port,
            metrics_port=find_free_port(self.host),
            is_disaggregated=self.model.is_disaggregated,
        )
        self.process = OwnedProcess(command, log_path=self.log_dir / f"{self.name}.log")

    async def wait_until_up(self) -> None:
        """Until /health answers. Raises ServerNotUp at the deadline, or when the process ends."""
        timeout_s = EXTERNAL_DEADLINE_S if self.is_external else self.args.engine_start_timeout_s
        deadline = time.monotonic() + timeout_s
        while not await self.is_up(timeout_s=LIFE_SIGN_S):
            code = None if self.process is None else self.process.poll()
            if code is not None or time.monotonic() > deadline:
                tail = "(--sglang-router-ip: not ours)" if self.process is None else self.process.log_tail()
                raise not_up(f"the router at {self.url}", code, timeout_s, tail)
            await asyncio.sleep(POLL_S)

    async def is_up(self, *, timeout_s: float | None = None) -> bool:
        """Whether it answers."""
        try:
            await get(f"{self.url}/health", timeout_s=timeout_s or self.args.rollout_health_check_timeout)
        except HTTPError:
            return False
        return True

    async def workers(self) -> dict[str, dict[str, Any]]:
        """Registered engines by address."""
        answer = await get(f"{self.url}/workers", timeout_s=30.0, retry_for_s=API_RETRY_S)
        return {worker["url"]: worker for worker in answer["workers"]}

    async def add(self, engine_url: str, *, role: Role = "regular", bootstrap_port: int | None = None) -> None:
        """Register an engine and wait until requests reach it. Raises ServerNotUp, HTTPError."""
        payload: dict[str, Any] = {"url": engine_url}
        if role != "regular":
            payload["worker_type"] = role
        if bootstrap_port is not None:
            payload["bootstrap_port"] = bootstrap_port
        if self.args.sglang_api_key is not None:
            payload["api_key"] = self.args.sglang_api_key
        try:
            await post(f"{self.url}/workers", payload, timeout_s=30.0, retry_for_s=API_RETRY_S)
        except HTTPError:
            if engine_url not in await self.workers():  # else an attempt whose answer was lost has registered it
                raise
        deadline = time.monotonic() + REGISTRATION_S
        while not (await self.workers()).get(engine_url, {}).get("is_healthy", False):
            if time.monotonic() > deadline:
                raise ServerNotUp(f"the router at {self.url} does not accept the engine {engine_url}")
            await asyncio.sleep(POLL_S)

    async def remove(self, engine_url: str) -> None:
        """Forget an engine; nothing where it is not registered."""
        worker = (await self.workers()).get(engine_url)
        if worker is not None:
            await delete(f"{self.url}/workers/{worker['id']}", timeout_s=30.0)

    def stop(self) -> None:
        """End our process."""
        if self.process is not None:
            self.process.stop()
