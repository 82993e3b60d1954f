"""An engine on two nodes, played by two bundles of this one, with a server in SGLang's place."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from ray.util.placement_group import placement_group, remove_placement_group

from slime.arguments import Args
from slime.backends.sglang_utils.arguments import value_of
from slime.config.served_models import read_served_models
from slime.ray.engine_fleet import EngineFleet
from slime.ray.engines import Engine
from slime.ray.placement import Slots, allocate
from slime.utils import http_utils
from slime.utils.http_utils import post
from tests.helpers.settings import run_args
from tests.helpers.tiny_models import make_tiny_model

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


@pytest_asyncio.fixture(autouse=True)
async def client() -> AsyncIterator[None]:
    """Closes the HTTP client of the test's event loop."""
    yield
    await http_utils.close()


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


async def test_an_engine_that_has_just_started_may_hang_but_not_end(fleet: EngineFleet, tmp_path: Path) -> None:
    fleet.args = replace(fleet.args, rollout_health_check_first_wait=300.0, rollout_health_check_timeout=0.2)
    (engine,) = fleet.engines
    replaced: list[str] = []

    async def replace_it(engine: Engine, url: str) -> None:
        replaced.append(url)

    fleet._replace = replace_it  # type: ignore[method-assign]
    try:
        await fleet._start(engine)
        await until(lambda: len(list(tmp_path.glob("node_?.json"))) == 2)
        listening, other = (json.loads((tmp_path / f"node_{rank}.json").read_text())[0] for rank in (0, 1))
        os.kill(listening, signal.SIGSTOP)
        await fleet._look_at(engine)
        assert replaced == []
        engine.up_since -= 301
        await fleet._look_at(engine)
        assert replaced == [engine.url]
        engine.up_since += 301
        os.kill(other, signal.SIGKILL)
        async with asyncio.timeout(10):
            while len(replaced) == 1:
                await fleet._look_at(engine)
    finally:
        await fleet.stop()


def models_of(folder: Path, *models: dict[str, object]) -> str:
    """A file of --sglang-config."""
    path = folder / "engines.yaml"
    path.write_text(json.dumps({"sglang": models}))
    return str(path)


@pytest.fixture
def two_models(tmp_path: Path) -> Iterator[EngineFleet]:
    """A fleet of a policy on the slots 2 and 3, of 4, and a judge on the first; none is started."""
    make_tiny_model(tmp_path / "model")
    make_tiny_model(tmp_path / "judge", seed=7)
    judge = {"name": "judge", "model_path": str(tmp_path / "judge")}
    regular, gap = {"worker_type": "regular", "num_gpus": 1}, {"worker_type": "placeholder", "num_gpus": 1}
    path = models_of(
        tmp_path,
        judge | {"server_groups": [regular | {"overrides": {"max_running_requests": 3}}, gap]},
        {"name": "actor", "server_groups": [regular | {"num_gpus": 2}]},
    )
    settings = ["--rollout-engine", "embedded", "--sglang-config", path, "--num-threads", "1"]
    (tmp_path / "prompts.jsonl").write_text('{"input": "1+2="}\n')
    args = run_args(tmp_path / "model", tmp_path / "prompts.jsonl", {}, *settings, "--sglang-max-running-requests", "5")
    group = placement_group([{"CPU": 0.4}] * 4)
    slots = Slots(group, "cpu", [0], [0], engine_bundles=[0, 1, 2, 3], node_of=dict.fromkeys(range(4), "a"))
    yield EngineFleet(args, slots, str(tmp_path))
    remove_placement_group(group)


async def test_groups_take_the_slots_one_after_the_other_with_settings_of_their_own(two_models: EngineFleet) -> None:
    judge, first, second = two_models.engines
    names = [(engine.name, engine.nodes) for engine in (judge, first, second)]
    assert names == [("judge_engine_0", [[0]]), ("engine_1", [[2]]), ("engine_2", [[3]])]
    commands = [(await two_models._commands(engine))[0].argv for engine in (judge, first)]
    assert [value_of(argv, "--max-running-requests") for argv in commands] == ["3", "5"]
    assert [str(value_of(argv, "--model-path")).rpartition("/")[2] for argv in commands] == ["judge", "model"]


@pytest.mark.slow
async def test_a_model_that_is_not_trained_takes_part_in_all_but_the_updates(two_models: EngineFleet) -> None:
    fleet = two_models
    judge, first, second = fleet.engines
    try:
        await fleet.start()
        addresses = await fleet.router_addresses()
        assert list(addresses) == ["judge", "actor"]
        assert len(set(addresses.values())) == 2
        assert list(await fleet.routers["judge"].workers()) == [judge.url], "it has its weights"
        assert await fleet.routers["actor"].workers() == {}, "the policy's are still to come"
        assert await fleet.begin_update() == [first.url, second.url]
        await fleet.weights_sent(4, str(fleet.args.hf_checkpoint), [second.url])
        assert set(await fleet.routers["actor"].workers()) == {first.url, second.url}
        await fleet.release_memory(["kv_cache", "weights"])
        os.kill(await process_id(judge), signal.SIGKILL)
        gone = judge.url
        await fleet._look_at(judge)
        assert judge.url == gone, "while trainers hold memory nothing is started"
        await fleet.resume_memory(["weights"])
        await fleet.resume_memory(["kv_cache"])
        assert (judge.num_starts, judge.is_lost) == (2, False)
        body = {"text": "1+2=", "sampling_params": {"max_new_tokens": 2}}
        answer = await post(f"{fleet.routers['judge'].url}/generate", body)
        assert answer["meta_info"]["weight_version"] == "default"
    finally:
        await fleet.stop()


async def test_prompts_and_decoding_of_one_model_have_groups_of_their_own(tmp_path: Path) -> None:
    regular = {"worker_type": "regular", "num_gpus": 1}
    path = models_of(
        tmp_path,
        {"name": "judge", "model_path": "/judge", "server_groups": [regular]},
        {
            "name": "actor",
            "server_groups": [
                {"worker_type": "prefill", "num_gpus": 1, "overrides": {"mem_fraction_static": 0.7}},
                {"worker_type": "decode", "num_gpus": 2, "num_gpus_per_engine": 2},
            ],
        },
    )
    models = read_served_models(path, checkpoint="/model", num_gpus_per_engine=1)
    args = Args(rollout_engine="sglang", hf_checkpoint="/model", file_models=models)
    group = placement_group([{"CPU": 0.4}] * 4)
    slots = Slots(group, "cpu", [0], [0], engine_bundles=[0, 1, 2, 3], node_of=dict.fromkeys(range(4), "a"))
    try:
        fleet = EngineFleet(args, slots, str(tmp_path))
        judge, prefill, decode = fleet.engines
        assert [(engine.role, engine.nodes) for engine in fleet.policy_engines] == [
            ("prefill", [[1]]),
            ("decode", [[2, 3]]),
        ]
        argv = {engine.role: (await fleet._commands(engine))[0].argv for engine in (judge, prefill, decode)}
        modes = {role: value_of(part, "--disaggregation-mode") for role, part in argv.items()}
        assert modes == {"regular": None, "prefill": "prefill", "decode": "decode"}
        assert {role: value_of(part, "--tp-size") for role, part in argv.items()} == {
            "regular": "1",
            "prefill": "1",
            "decode": "2",
        }
        assert [value_of(part, "--mem-fraction-static") for part in argv.values()] == [None, "0.7", None]
        assert {name: router.model.is_disaggregated for name, router in fleet.routers.items()} == {
            "judge": False,
            "actor": True,
        }
    finally:
        remove_placement_group(group)


async def process_id(engine: Engine) -> int:
    """Of the process that listens at its address."""
    port = int(engine.url.rpartition(":")[2])
    (found,) = {c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN}
    assert found is not None
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it, 10 s at most."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.05)
