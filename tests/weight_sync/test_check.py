"""SGLang's weights compared through its own loader, at a stand-in that speaks the two routes this takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file
from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.utils.checksum import tensor_checksum
from slime.utils.http_utils import find_free_port
from slime.weight_sync.check import WeightMismatch, check_by_reloading, check_files


class FusingEngine:
    """Holds q and k as one tensor, as SGLang does. deaf_to: a tensor that updates do not reach."""

    def __init__(self, tensors: dict[str, Tensor], deaf_to: str | None) -> None:
        self.tensors, self.deaf_to = {name: tensor.clone() for name, tensor in tensors.items()}, deaf_to
        self.is_paused = False

    async def weights_checker(self, request: web.Request) -> web.Response:
        """SGLang's answer to the actions `checksum` and `reset_tensors`."""
        if (await request.json())["action"] == "reset_tensors":
            self.tensors = {name: torch.rand(tensor.shape) for name, tensor in self.tensors.items()}
            return web.json_response({"success": True})
        fused = {"qk": torch.cat([self.tensors["q"], self.tensors["k"]]), "norm": self.tensors["norm"]}
        checksums = {name: tensor_checksum(tensor) for name, tensor in fused.items()}
        return web.json_response({"success": True, "ranks": [{"checksums": checksums}]})

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        """Loads the one file of a directory; refused, as SGLang's end would be, while requests may be running."""
        assert self.is_paused
        loaded = load_file(Path((await request.json())["model_path"]) / "model.safetensors")
        self.tensors |= {name: tensor for name, tensor in loaded.items() if name != self.deaf_to}
        return web.json_response({"success": True})

    async def pause(self, request: web.Request) -> web.Response:
        """Both ways."""
        self.is_paused = request.path == "/pause_generation"
        return web.json_response({"status": "ok"})


@contextmanager
def serving(engine: FusingEngine) -> Iterator[EngineClient]:
    """A client of the engine."""
    app = web.Application()
    app.router.add_post("/weights_checker", engine.weights_checker)
    app.router.add_post("/update_weights_from_disk", engine.update_weights_from_disk)
    app.router.add_post("/pause_generation", engine.pause)
    app.router.add_post("/continue_generation", engine.pause)
    runner, port = web.AppRunner(app), find_free_port()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    run(start())
    try:
        yield EngineClient(f"http://127.0.0.1:{port}", is_sglang=True)
    finally:
        run(runner.cleanup())


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Weights that were sent."""
    return {name: torch.randn(3, 4) for name in ("q", "k", "norm")}


@pytest.fixture
def directory(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """The same as a Hugging Face directory."""
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return tmp_path


def test_an_engine_that_holds_what_it_loads_passes_and_goes_on(tensors: dict[str, Tensor], directory: Path) -> None:
    engine = FusingEngine(tensors, None)
    with serving(engine) as client:
        run(check_by_reloading(client, directory, version=1, timeout_s=10))
    assert not engine.is_paused
    assert all(torch.equal(engine.tensors[name], tensors[name]) for name in tensors)


def test_a_tensor_that_an_update_did_not_reach_is_named(tensors: dict[str, Tensor], directory: Path) -> None:
    with (
        serving(FusingEngine(tensors, deaf_to="k")) as client,
        pytest.raises(WeightMismatch, match=r"holds 1 tensors that differ .* first qk of rank 0"),
    ):
        run(check_by_reloading(client, directory, version=1, timeout_s=10))


def test_a_tensor_that_arrived_wrong_is_named(tensors: dict[str, Tensor], directory: Path) -> None:
    arrived = tensors | {"norm": tensors["norm"] + 1}
    with serving(FusingEngine(arrived, None)) as client, pytest.raises(WeightMismatch, match="first norm of rank 0"):
        run(check_by_reloading(client, directory, version=1, timeout_s=10))


def test_files_that_differ_from_what_was_sent_are_named(tensors: dict[str, Tensor], directory: Path) -> None:
    sent = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    check_files(directory, sent)
    with pytest.raises(WeightMismatch, match=r"holds 1 tensors that differ from those sent, first norm"):
        check_files(directory, sent | {"norm": "0"})
