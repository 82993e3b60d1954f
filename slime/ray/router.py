"""The sglang-router process and the engines registered with it."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from slime.arguments import Args
from slime.ray.engine_command import router_command
from slime.utils.http_utils import HTTPError, delete, find_free_port, get, post
from slime.utils.processes import OwnedProcess

logger = logging.getLogger(__name__)

POLL_S = 0.1


class ServerNotUp(RuntimeError):
    """A server did not come up within its deadline; the message ends with its log."""


class Router:
    """Our own router, or an external one that is only talked to."""

    def __init__(self, args: Args, *, host: str, log_dir: Path) -> None:
        self.args = args
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
        command = router_command(self.args, host=self.host, port=self.port, metrics_port=find_free_port(self.host))
        self.process = OwnedProcess(command, log_path=self.log_dir / "router.log")

    async def wait_until_up(self) -> None:
        """Until /health answers. Raises ServerNotUp at the deadline, or when the process ends."""
        deadline = time.monotonic() + self.args.engine_start_timeout_s
        while not await self.is_up():
            code = None if self.process is None else self.process.poll()
            if code is not None or time.monotonic() > deadline:
                tail = "" if self.process is None else self.process.log_tail()
                state = "did not answer in time" if code is None else f"ended with code {code}"
                raise ServerNotUp(f"the router at {self.url} {state}. Its log ends:\n{tail}")
            await asyncio.sleep(POLL_S)

    async def is_up(self) -> bool:
        """Whether it answers."""
        try:
            await get(f"{self.url}/health", timeout_s=self.args.rollout_health_check_timeout)
        except HTTPError:
            return False
        return True

    async def workers(self) -> dict[str, dict[str, Any]]:
        """Registered engines by address."""
        answer = await get(f"{self.url}/workers", timeout_s=30.0)
        return {worker["url"]: worker for worker in answer["workers"]}

    async def add(self, engine_url: str) -> None:
        """Register an engine and wait until requests reach it. Raises ServerNotUp."""
        payload: dict[str, Any] = {"url": engine_url}
        if self.args.sglang_api_key is not None:
            payload["api_key"] = self.args.sglang_api_key
        await post(f"{self.url}/workers", payload, timeout_s=30.0, retry_for_s=10.0)
        deadline = time.monotonic() + self.args.engine_start_timeout_s
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
