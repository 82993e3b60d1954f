"""Against a real embedded engine in a process of its own."""

from __future__ import annotations

import base64
import copyreg
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.embedded_engine import EngineUnderTest, free_port, running_engine
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from slime.engine.client import EngineClient, EngineError
from slime.utils.async_utils import run
from slime.utils.http_utils import HTTPError
from slime.weight_sync import tensor
from slime.weight_sync.bucket import Bucket
from slime.weight_sync.check import WeightMismatch
from slime.weight_sync.disk import DiskTransport
from slime.weight_sync.distributed import DistributedTransport
from slime.weight_sync.tensor import TensorTransport
from slime.weight_sync.update import Transport, send_weights

PROMPT = [5, 8, 13, 21, 34]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied and with experts, which lie fused in memory: where names and tensors differ most from the checkpoint's."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "first", "qwen3_moe", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[EngineUnderTest]:
    with running_engine(model, "--random-seed", "0", "--num-threads", "1") as running:
        yield running


def other_weights(model: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(model / "model.safetensors")
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def log_probs(engine: EngineUnderTest) -> list[float]:
    greedy = {"temperature": 0.0, "max_new_tokens": 1}
    answer = engine.generate(input_ids=PROMPT, sampling_params=greedy, return_logprob=True, logprob_start_len=0)
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


def inline(bucket: Bucket) -> str:
    """As `tensor.serialize`, with the bytes themselves: a CPU has no handle that another process could open safely."""
    padded = functional.pad(bucket.data, (0, -len(bucket.data) % 8)).view(torch.int64)
    places = [
        SimpleNamespace(name=place.name, shape=place.shape, dtype=place.dtype, start_idx=place.start, end_idx=place.end)
        for place in bucket.places
    ]
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda data: (torch.LongTensor, (data.tolist(),))}
    pickler.dump({"flattened_tensor": padded, "metadata": places})
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(autouse=True)
def bytes_instead_of_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "serialize", inline)


def make_transport(kind: str, model: Path, folder: Path) -> Transport:
    if kind == "disk":
        return DiskTransport(folder, assets=str(model), is_writer=True)
    if kind == "distributed":
        return DistributedTransport(is_sender=True, device=torch.device("cpu"), bucket_bytes=20_000)
    return TensorTransport(rank=0, ranks_per_engine=1, bucket_bytes=20_000)


def send(
    engines: list[str],
    model: Path,
    folder: Path,
    version: int,
    tensors: dict[str, Tensor],
    *,
    check: bool = True,
    kind: str = "disk",
) -> list[str]:
    transport = make_transport(kind, model, folder)
    lost = send_weights(
        tensors.items(),
        transport,
        [EngineClient(url, timeout_s=20.0) for url in engines],
        version=version,
        timeout_s=20.0,
        check_equal=check,
        is_reporter=True,
    )
    if isinstance(transport, DistributedTransport):
        run(transport.close())
    return lost


all_transports = pytest.mark.parametrize("kind", ["disk", "tensor", "distributed"])


@all_transports
def test_an_engine_takes_the_weights_and_counts_the_version(
    engine: EngineUnderTest, model: Path, tmp_path: Path, kind: str
) -> None:
    assert send([engine.url], model, tmp_path, 1, load_file(model / "model.safetensors"), kind=kind) == []
    before = log_probs(engine)
    assert send([engine.url], model, tmp_path, 2, other_weights(model), kind=kind) == []
    assert engine.get("/model_info").json["weight_version"] == "2"
    assert log_probs(engine) != before
    assert [path.name for path in tmp_path.iterdir()] == (["v000002"] if kind == "disk" else [])
    send([engine.url], model, tmp_path, 3, load_file(model / "model.safetensors"), kind=kind)
    assert log_probs(engine) == before


@all_transports
def test_a_tensor_larger_than_a_bucket_and_of_another_type_arrives(
    engine: EngineUnderTest, model: Path, tmp_path: Path, kind: str
) -> None:
    tensors = {name: tensor.bfloat16() if "norm" in name else tensor for name, tensor in other_weights(model).items()}
    assert max(tensor.nbytes for tensor in tensors.values()) > 20_000
    exact = {name: tensor.float() for name, tensor in tensors.items()}
    send([engine.url], model, tmp_path, 8, exact, kind=kind)
    expected = log_probs(engine)
    send([engine.url], model, tmp_path, 9, tensors, check=False, kind=kind)
    assert log_probs(engine) == expected


def two_trainers(model: Path, urls: list[str], gone: str) -> None:
    rank = dist.get_rank()
    tensor.serialize = inline
    transport = TensorTransport(rank=rank, ranks_per_engine=1, bucket_bytes=20_000)
    for version, addresses in ((10, urls), (11, [gone, urls[1]]), (12, [None, urls[1]])):
        lost = send_weights(
            other_weights(model).items(),
            transport,
            [None if url is None else EngineClient(url, timeout_s=20.0) for url in addresses],
            version=version,
            timeout_s=20.0,
            check_equal=True,
            is_reporter=rank == 0,
        )
        assert lost == ([gone] if version == 11 else [])


def test_each_of_two_trainers_gives_its_own_engine_the_weights(
    engine: EngineUnderTest, model: Path, tmp_path: Path
) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    with running_engine(model, "--random-seed", "0", "--num-threads", "1") as second:
        run_ranks(two_trainers, 2, model, [engine.url, second.url], gone, store=tmp_path / "store")
        assert engine.get("/model_info").json["weight_version"] == "10"
        assert second.get("/model_info").json["weight_version"] == "12"
        assert log_probs(engine) == log_probs(second)


@all_transports
def test_an_engine_that_does_not_answer_is_reported_and_the_others_go_on(
    engine: EngineUnderTest, model: Path, tmp_path: Path, kind: str
) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    if kind == "tensor":  # the engine of this rank is the first
        assert send([gone, engine.url], model, tmp_path, 4, other_weights(model), check=False, kind=kind) == [gone]
        return
    assert send([gone, engine.url], model, tmp_path, 4, other_weights(model)) == [gone]
    assert engine.get("/model_info").json["weight_version"] == "4"
    assert len(log_probs(engine)) == len(PROMPT) - 1


def test_a_tensor_that_differs_on_the_other_side_is_named(engine: EngineUnderTest, model: Path, tmp_path: Path) -> None:
    class Corrupting(DiskTransport):
        def write(self, tensors: object, version: int) -> Path:
            path = super().write(tensors, version)  # type: ignore[arg-type]
            (shard,) = path.glob("*.safetensors")
            stored = load_file(shard)
            stored["model.norm.weight"][3] += 1
            save_file(stored, shard, metadata={"format": "pt"})
            return path

    with pytest.raises(WeightMismatch, match=r"holds 1 tensors that differ from those sent, first model\.norm\.weight"):
        send_weights(
            other_weights(model).items(),
            Corrupting(tmp_path, assets=str(model), is_writer=True),
            [EngineClient(engine.url)],
            version=5,
            timeout_s=20.0,
            check_equal=True,
            is_reporter=True,
        )


@all_transports
def test_weights_that_were_not_sent_are_noticed(
    engine: EngineUnderTest, model: Path, tmp_path: Path, kind: str
) -> None:
    tensors = other_weights(model)
    del tensors[next(name for name in tensors if name.startswith("model.layers.1.mlp") and "up_proj" in name)]
    with pytest.raises((WeightMismatch, EngineError, HTTPError), match=r"model\.layers\.1\.mlp"):
        send([engine.url], model, tmp_path, 6, tensors, kind=kind)
    engine.post("/continue_generation")


@all_transports
def test_weights_that_the_engine_refuses_end_the_update_with_its_words(
    engine: EngineUnderTest, model: Path, tmp_path: Path, kind: str
) -> None:
    tensors = other_weights(model)
    tensors["model.norm.weight"] = torch.zeros(3)
    with pytest.raises((EngineError, HTTPError), match=r"model\.norm\.weight"):
        send([engine.url], model, tmp_path, 7, tensors, check=False, kind=kind)
    engine.post("/continue_generation")


def test_ranks_that_do_not_write_talk_to_no_engine(model: Path, tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path, assets=str(model), is_writer=False)
    nobody = [EngineClient("http://127.0.0.1:1")]
    tensors = load_file(model / "model.safetensors").items()
    sent = send_weights(tensors, transport, nobody, version=1, timeout_s=1.0, check_equal=True, is_reporter=False)
    assert sent == []


def test_a_plug_in_gets_a_complete_version_before_engines_do(
    engine: EngineUnderTest, model: Path, tmp_path: Path
) -> None:
    seen: list[tuple[list[str], str]] = []

    def look(directory: str, engines: list[EngineClient]) -> None:
        (client,) = engines
        seen.append(
            (sorted(load_file(next(Path(directory).glob("*.safetensors")))), run(client.model_info())["weight_version"])
        )

    transport = DiskTransport(tmp_path, assets=str(model), is_writer=True, after_write=look)
    for version in (21, 22):
        transport.send(other_weights(model).items(), [None, EngineClient(engine.url)], version, timeout_s=20.0)
    assert [names for names, _ in seen] == [sorted(other_weights(model))] * 2
    assert seen[1][1] == "21"
