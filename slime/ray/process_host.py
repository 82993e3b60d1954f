"""An actor that owns one engine process on the node of its slot. Light: it imports neither torch nor an engine."""

from __future__ import annotations

import os
from pathlib import Path

import ray

from slime.ray.actors import CONTROL
from slime.ray.watchdog import thread_stacks
from slime.utils.http_utils import find_free_port
from slime.utils.processes import OwnedProcess

PORT = "{port}"


class ProcessHost:
    """Starts, watches and ends one process. When this actor ends, so does the process."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = Path(log_dir)
        self.process: OwnedProcess | None = None

    def start(self, name: str, command: list[str], env: dict[str, str], *, loopback: bool) -> str:
        """Run `command`, its `{port}` replaced by a free port. Returns `http://host:port`.

        loopback: bind to this machine only, else to the node's address, which replaces `{host}`.
        """
        self.stop()
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        port = find_free_port(host)
        filled = [part.replace(PORT, str(port)).replace("{host}", host) for part in command]
        self.process = OwnedProcess(filled, log_path=self.log_dir / f"{name}.log", env={**os.environ, **env})
        return f"http://{host}:{port}"

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return None if self.process is None else self.process.poll()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "" if self.process is None else self.process.log_tail()

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stop()
            self.process = None

    @ray.method(concurrency_group=CONTROL)
    def stacks(self) -> str:
        """What every thread is doing."""
        return thread_stacks()
