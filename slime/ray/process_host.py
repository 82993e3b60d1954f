"""An actor that owns one engine process on the node of its slot. Light: it imports neither torch nor an engine."""

from __future__ import annotations

import os
from pathlib import Path

import ray

from slime.engine.spec import HEAD, HOST, PORT, EngineCommand
from slime.ray.actors import CONTROL
from slime.ray.watchdog import thread_stacks
from slime.utils.http_utils import find_free_port
from slime.utils.processes import OwnedProcess

HIGHEST_PORT = 55_535  # SGLang adds 10,000 to its own for a second one


class ProcessHost:
    """Starts, watches and ends one process. When this actor ends, so does the process."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = Path(log_dir)
        self.process: OwnedProcess | None = None

    def start(self, name: str, command: EngineCommand, *, loopback: bool, head: str = "") -> str:
        """Run `command`, its places for address and a free port filled in. Returns `http://host:port`.

        loopback: bind to this machine only, else to the node's address. head: where an engine on several nodes meets.
        """
        self.stop()
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        port = find_free_port(host, highest=HIGHEST_PORT)
        argv = [part.replace(PORT, str(port)).replace(HOST, host).replace(HEAD, head) for part in command.argv]
        self.process = OwnedProcess(argv, log_path=self.log_dir / f"{name}.log", env={**os.environ, **command.env})
        return f"http://{host}:{port}"

    def free_address(self) -> str:
        """`address:port` of this node that nobody listens on at the moment."""
        host = ray.util.get_node_ip_address()
        return f"{host}:{find_free_port(host)}"

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
