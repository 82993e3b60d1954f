"""Starts one embedded engine: `python -m slime.engine.embedded.server --model-path DIR --port P`.

What can be refused without torch is refused before torch is imported, so that a wrong path or a port in use ends the
process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path

from slime.engine.embedded.args import ServerArgs, parse_server_args
from slime.engine.embedded.refusal import Refused
from slime.utils.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may keep the interpreter from the model's thread; Python's default is ten times as long."""


BACKLOG = 4096
"""Connections that may wait to be accepted: a rollout opens hundreds at once."""


def main() -> None:
    """Serves as the command line says; a refusal is one sentence on stderr and exit code 1."""
    args = parse_server_args()
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):  # until uvicorn takes over, and again when it has ended
        signal.signal(number, lambda *_: os._exit(0))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    make_matrix_products_reproducible()
    keep_freed_memory()
    # Threads that spin starve those they wait for on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        _check_folders(args)
        listener = _listen(args.host, args.port)
        from slime.engine.embedded.app import Server

        server = Server(args)
    except Refused as refusal:
        sys.exit(f"error: {refusal}")
    listener.listen(BACKLOG)
    logger.info("serving %s on http://%s:%d", args.model_path, args.host, args.port)
    server.run(listener)
    os._exit(1 if server.has_crashed else 0)  # not sys.exit: the engine's thread may be inside a long forward pass


def make_matrix_products_reproducible() -> None:
    """Has Intel's MKL sum in one order whatever the shape and the threads; only before its first use in a process.

    Without it a row of a product depends on the number of rows (torch 2.11 on a Xeon: up to 384 rows). It costs nothing
    measurable, neither there nor on AMD's processors.
    """
    cpu_info = Path("/proc/cpuinfo")
    words = set(cpu_info.read_text().split()) if cpu_info.is_file() else set()
    branch = "AVX512" if {"GenuineIntel", "avx512f"} <= words else "AVX2"
    if "avx2" in words:
        os.environ.setdefault("MKL_CBWR", f"{branch},STRICT")


def _check_folders(args: ServerArgs) -> None:
    for flag, folder in (("--model-path", args.model_path), ("--tokenizer-path", args.tokenizer_path)):
        if folder is not None and not Path(folder).is_dir():
            raise Refused(f"{flag} {folder} is not a folder.")
    if not (Path(args.model_path) / "config.json").is_file():
        raise Refused(f"--model-path {args.model_path} has no config.json: it is not a Hugging Face checkpoint.")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is known before the model is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise Refused(f"cannot listen on {host}:{port}: {error.strerror}.") from error
    return listener


if __name__ == "__main__":
    main()
