"""An engine on two nodes, played by two bundles of this one, with a server in SGLang's place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from slime.arguments import Args
from slime.backends.sglang_utils.arguments import value_of
from slime.ray.engine_fleet import EngineFleet
from slime.ray.placement import allocate

pytestmark = pytest.mark.usefixtures("local_ray")

# Writes down how it was called, and answers every GET.
SERVER = """
import http.server, json, os, pathlib, sys
argv = sys.argv[1:]
rank, port = (argv[argv.index(flag) + 1] for flag in ("--node-rank", "--port"))
path = pathlib.Path(FOLDER, f"node_{rank}.json")
path.with_suffix(".tmp").write_text(json.dumps([os.getpid(), *argv]))
path.with_suffix(".tmp").rename(path)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[EngineFleet]:
    """A fleet of one engine, which is not started yet."""
    script, python = tmp_path / "server.py", tmp_path / "python"
    script.write_text(f"FOLDER = {str(tmp_path)!r}\n{SERVER}")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    cluster = Args(device="cpu", actor_num_gpus_per_node=2, rollout_num_gpus=2, colocate=True)
    slots = allocate(cluster)
    settings = replace(
        cluster,
        rollout_engine="sglang",
        sglang_python=str(python),
        rollout_num_gpus_per_engine=2,
        hf_checkpoint="/model",
    )
    first, second = slots.engine_bundles
    yield EngineFleet(settings, replace(slots, node_of={first: "a", second: "b"}), str(tmp_path))
    slots.release()


async def test_an_engine_on_two_nodes_has_a_process_on_each_and_ends_with_either(
    fleet: EngineFleet, tmp_path: Path
) -> None:
    (engine,) = fleet.engines
    try:
        await fleet._start(engine)
        await until(lambda: len(list(tmp_path.glob("node_?.json"))) == 2)
        calls = [json.loads((tmp_path / f"node_{rank}.json").read_text()) for rank in (0, 1)]
        heads = {value_of(call[1:], "--dist-init-addr") for call in calls}
        assert len(heads) == 1
        assert ":" in str(heads.pop())
        assert {value_of(call[1:], "--tp-size") for call in calls} == {"2"}
        assert engine.url == f"http://127.0.0.1:{value_of(calls[0][1:], '--port')}"
        assert await fleet._poll(engine) is None
        os.kill(calls[1][0], signal.SIGKILL)
        async with asyncio.timeout(10):
            while await fleet._poll(engine) is None:
                await asyncio.sleep(0.05)
    finally:
        await fleet.stop()
    await until(lambda: not psutil.pid_exists(calls[0][0]))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 10 s at most."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.05)
