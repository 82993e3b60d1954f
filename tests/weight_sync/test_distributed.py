"""The distributed transport over gloo, against real embedded engines in processes of their own; faults are real."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.embedded_engine import EngineUnderTest, free_port, running_engine
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from slime.engine.client import EngineClient
from slime.utils.async_utils import run
from slime.weight_sync import update_group
from slime.weight_sync.distributed import DistributedTransport
from slime.weight_sync.update import send_weights
from slime.weight_sync.update_group import own_address

BUCKET_BYTES = 20_000
DEADLINE_S = 4.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "first")


@pytest.fixture(scope="module")
def engines(model: Path) -> Iterator[list[EngineUnderTest]]:
    """Two that outlive every test."""
    with running(model, 2) as started:
        yield started


@contextlib.contextmanager
def running(model: Path, num_engines: int) -> Iterator[list[EngineUnderTest]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running_engine(model, "--num-threads", "1")) for _ in range(num_engines)]


@pytest.fixture
def transport() -> Iterator[DistributedTransport]:
    transport = DistributedTransport(is_sender=True, device=torch.device("cpu"), bucket_bytes=BUCKET_BYTES)
    yield transport
    run(transport.close())


def weights(model: Path, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def send(
    transport: DistributedTransport,
    engines: list[EngineUnderTest],
    model: Path,
    version: int,
    *,
    interrupt: Callable[[], None] = lambda: None,
) -> list[str]:
    """The addresses that were lost; those that were not hold all tensors. interrupt: called in the middle."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        named = list(weights(model, version).items())
        for index, pair in enumerate(named):
            if index == len(named) // 2:
                interrupt()
            yield pair

    return send_weights(
        tensors(),
        transport,
        [EngineClient(engine.url, timeout_s=DEADLINE_S) for engine in engines],
        version=version,
        timeout_s=DEADLINE_S,
        check_equal=True,
        is_reporter=True,
    )


def version_of(engine: EngineUnderTest) -> str:
    return str(engine.get("/model_info").json["weight_version"])


def test_one_group_with_all_engines_serves_update_after_update(
    engines: list[EngineUnderTest], model: Path, transport: DistributedTransport
) -> None:
    assert send(transport, engines, model, 1) == []
    group = transport.group
    assert group is not None
    assert send(transport, engines, model, 2) == []
    assert transport.group is group
    assert [version_of(engine) for engine in engines] == ["2", "2"]
    assert send(transport, engines[:1], model, 3) == []
    assert transport.group is not group
    assert [version_of(engine) for engine in engines] == ["3", "2"]


def test_no_engine_at_all_is_no_hindrance(model: Path, transport: DistributedTransport) -> None:
    assert send(transport, [], model, 1) == []


def test_an_engine_that_is_gone_is_reported_and_the_others_get_the_version(
    engines: list[EngineUnderTest], model: Path, transport: DistributedTransport
) -> None:
    gone = EngineUnderTest(f"http://127.0.0.1:{free_port()}", model)
    send(transport, engines, model, 4)
    assert send(transport, [gone, *engines], model, 5) == [gone.url]
    assert [version_of(engine) for engine in engines] == ["5", "5"]


def two_trainers(urls: list[str], model: Path) -> None:
    is_sender = dist.get_rank() == 0
    transport = DistributedTransport(is_sender=is_sender, device=torch.device("cpu"), bucket_bytes=BUCKET_BYTES)
    for version in (6, 7):
        gathered = ((name, tensor.clone()) for name, tensor in weights(model, version).items())
        lost = send_weights(
            ((name, _after_all(tensor)) for name, tensor in gathered),
            transport,
            [EngineClient(url) for url in urls],
            version=version,
            timeout_s=20.0,
            check_equal=True,
            is_reporter=is_sender,
        )
        assert lost == []
    run(transport.close())


def _after_all(tensor: Tensor) -> Tensor:
    """Halves of two ranks added up: gathering is a collective of the trainers, beside the group with the engines."""
    half = tensor / 2
    dist.all_reduce(half)
    return half


@pytest.mark.slow
def test_trainers_gather_in_a_group_of_their_own_and_one_of_them_sends(
    engines: list[EngineUnderTest], model: Path, tmp_path: Path
) -> None:
    run_ranks(two_trainers, 2, [engine.url for engine in engines], model, store=tmp_path / "store")
    assert [version_of(engine) for engine in engines] == ["7", "7"]


@pytest.mark.slow
def test_an_engine_killed_in_the_middle_is_reported_and_the_others_get_every_tensor(
    engines: list[EngineUnderTest], model: Path, transport: DistributedTransport
) -> None:
    with running(model, 1) as (victim,):
        order = [engines[0], victim, engines[1]]
        lost = send(transport, order, model, 8, interrupt=lambda: os.kill(victim.pid, signal.SIGKILL))
    assert lost == [victim.url]
    assert [version_of(engine) for engine in engines] == ["8", "8"]
    assert send(transport, engines, model, 9) == []


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_engine_that_hangs_in_the_middle_is_reported_at_the_deadline_and_lets_the_others_go(
    engines: list[EngineUnderTest], model: Path, transport: DistributedTransport, place: int
) -> None:
    with running(model, 1) as (victim,):  # with three engines gloo has one pass on to another what it gets
        order = [*engines[:place], victim, *engines[place:]]
        begin = time.monotonic()
        lost = send(transport, order, model, 10, interrupt=lambda: os.kill(victim.pid, signal.SIGSTOP))
        assert time.monotonic() - begin < 8 * DEADLINE_S
    assert lost == [victim.url]
    assert [version_of(engine) for engine in engines] == ["10", "10"]
    assert send(transport, engines, model, 11) == []


@pytest.mark.slow
def test_an_engine_that_never_joins_the_group_is_named_and_the_others_get_one_without_it(
    engines: list[EngineUnderTest],
    model: Path,
    transport: DistributedTransport,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(model, 1) as (victim,):
        opening = update_group.UpdateGroup.open

        async def open_without_it(group: update_group.UpdateGroup) -> update_group.Failures:
            os.kill(victim.pid, signal.SIGSTOP)
            return await opening(group)

        monkeypatch.setattr(update_group.UpdateGroup, "open", open_without_it)
        lost = send(transport, [victim, *engines], model, 12)
    assert lost == [victim.url]
    assert f"{victim.url} is lost on the way to weights v12: " in caplog.text
    assert "no answer within" in caplog.text
    assert [version_of(engine) for engine in engines] == ["12", "12"]


@pytest.mark.slow
def test_an_engine_started_anew_at_the_same_address_gets_a_new_group(
    model: Path, transport: DistributedTransport
) -> None:
    port = free_port()
    for version in (13, 14):
        with running_engine(model, "--num-threads", "1", port=port) as engine:
            assert send(transport, [engine], model, version) == []
            assert version_of(engine) == str(version)


def test_a_refusal_that_keeps_an_engine_from_joining_ends_the_update_for_all_with_its_words(
    engines: list[EngineUnderTest], model: Path, transport: DistributedTransport
) -> None:
    send(transport, engines, model, 15)
    assert transport.group is not None
    name = transport.group._name
    assert engines[1].post("/destroy_weights_update_group", {"group_name": name}).status == 200
    begin = time.monotonic()
    with pytest.raises(Exception, match="there is no weight-update group"):
        send(transport, engines, model, 16)
    assert time.monotonic() - begin < 3 * DEADLINE_S
    for engine in engines:
        engine.post("/continue_generation")
    assert send(transport, engines, model, 17) == []


def test_the_address_of_this_machine_is_one_that_engines_can_reach() -> None:
    assert own_address(["http://127.0.0.1:30000"]) == "127.0.0.1"
    outside = own_address(["http://127.0.0.1:30000", "http://192.0.2.1:30000"])
    assert not outside.startswith("127.")
