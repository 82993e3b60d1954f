"""The estimate against what a tiny Megatron model really holds, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import make_megatron, two_rollouts
from helpers.model_families import write_tiny_model
from helpers.tiny_models import make_tiny_model
from helpers.training import run_ranks, settings_for, world_of_one
from transformers import AutoConfig

from slime.backends.megatron_utils.names import read_shape
from slime.backends.shared.varlen import of_one_width
from slime.cli.dry_run import count, empty_model
from slime.cli.megatron_memory import activations, estimate, stages, states
from slime.cli.memory_estimate import ModelSize, TrainingLoad, layer_activation_bytes

LOAD = TrainingLoad(num_ranks=1, micro_batch_tokens=1024, logit_chunk_tokens=1, compute_bytes=4)
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    with megatron_on_cpu(), world_of_one():
        yield
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def held_bytes(backend: Any) -> dict[str, int]:
    """By the kinds of the estimate; an optimizer's float32 weights are its own where the model's are others."""
    from slime.backends.megatron_utils.optimizer import gradient_buffers, state_tensors

    own = {tensor.data_ptr() for tensor in backend.chunk.weights().values()}
    kinds = {
        "weights": backend.chunk.weights().values(),
        "gradients": gradient_buffers(backend.chunk.wrapped),
        "optimizer": (tensor for tensor in state_tensors(backend.optimizer) if tensor.data_ptr() not in own),
    }
    return {kind: sum(tensor.numel() * tensor.element_size() for tensor in found) for kind, found in kinds.items()}


def estimated(args: Any, *, dtype: torch.dtype = torch.float32, number: int = 0, num_ranks: int = 1) -> dict[str, int]:
    stage = stages(read_shape(args.hf_checkpoint), args)[number]
    return states(stage, args, compute_bytes=dtype.itemsize, num_ranks=num_ranks)


def size_of(folder: Path) -> ModelSize:
    return ModelSize.from_config(AutoConfig.from_pretrained(folder).to_dict(), count(empty_model(str(folder))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen3", {}),
        ("qwen2", {"freeze_params_name_list": ["embed_tokens", r"layers\.0\."]}),
        ("qwen3_moe", {"accumulate_allreduce_grads_in_fp32": False}),
    ],
)
def test_states_are_those_that_are_held(
    architecture: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "model", architecture, tie_word_embeddings=architecture == "qwen2")
    args = settings_for(model, bf16=dtype == torch.bfloat16, **settings)
    reduces = {"accumulate_allreduce_grads_in_fp32": args.accumulate_allreduce_grads_in_fp32}
    backend = make_megatron(args, **reduces)
    backend.load()
    two_rollouts(backend, args, tmp_path)
    assert held_bytes(backend) == estimated(args, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_rank", [16, None])
def test_states_of_latent_attention_are_those_that_are_held(
    q_rank: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_tiny_model("deepseek_v3", tmp_path / "model", vocab_size=320, initializer_range=0.2, q_lora_rank=q_rank)
    args = settings_for(tmp_path / "model", bf16=dtype == torch.bfloat16)
    backend = make_megatron(args)
    backend.load()
    two_rollouts(backend, args, tmp_path)
    assert held_bytes(backend) == estimated(args, dtype=dtype)


def test_moments_on_the_host_are_counted_there(tmp_path: Path) -> None:
    from slime.backends.megatron_utils.optimizer import parts_of

    model = make_tiny_model(tmp_path / "model", "qwen3_moe")
    plain, args = settings_for(model, bf16=True), settings_for(model, bf16=True, optimizer_cpu_offload=True)
    backend: Any = make_megatron(args, optimizer_cpu_offload=True)
    backend.load()
    states = [state for part in parts_of(backend.optimizer) for state in part.optimizer.state.values()]
    held = sum(moment.nbytes for state in states for moment in state.values())
    load = dataclasses.replace(LOAD, compute_bytes=2)
    ours, theirs = (estimate(read_shape(str(model)), size_of(model), one, load) for one in (args, plain))
    assert (ours.moments, theirs.moments) == (held, 0)
    assert ours.parts["optimizer"] == held_bytes(backend)["optimizer"] - held == theirs.parts["optimizer"] - held
    assert ours.asleep == theirs.asleep - held
    half = dataclasses.replace(args, optimizer_offload_fraction=0.5)
    assert estimate(read_shape(str(model)), size_of(model), half, load).moments == held / 2


class AttentionOfGPUs(torch.autograd.Function):
    """Keeps what the variable-length kernel keeps: queries, keys, values, result, log of the normaliser."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[:2]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.zeros_like, ctx.saved_tensors[:3]))


class NormOfGPUs(torch.autograd.Function):
    """Keeps its input and 1/rms."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, torch.zeros(hidden.shape[:-1]), weight)
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), torch.zeros_like(ctx.saved_tensors[2])


@pytest.fixture
def kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.backends.megatron_utils import attention

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
        return AttentionOfGPUs.apply(*of_one_width(query, key, value))[..., : value.shape[-1]]

    monkeypatch.setattr(attention, "_by_segment", kernel)
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda hidden, shape, weight, eps: NormOfGPUs.apply(hidden, weight)
    )


def kept_bytes_of_a_token(backend: Any, args: Any, folder: Path) -> float:
    """What layers keep for the backward of a micro-batch, weights left out, a token."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in backend.chunk.weights().values()}
    seen: dict[int, torch.Tensor] = {}
    marks: list[tuple[int, int]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def mark(module: Any, inputs: Any, options: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            marks.append((len(seen), options["hidden_states"].shape[0]))

    decoder = backend.chunk.lms[0].decoder
    decoder.register_forward_hook(mark, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        two_rollouts(backend, dataclasses.replace(args, micro_batch_size=8), folder)
    (number, num_tokens), *_ = marks
    kept = {pointer: tensor for pointer, tensor in list(seen.items())[:number] if pointer not in weights}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / num_tokens


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen3", {}),
        ("qwen2", {}),
        ("qwen3", UNIFORM | {"recompute_num_layers": 1}),
        ("qwen3", UNIFORM | {"recompute_num_layers": 2}),
        ("qwen3", BLOCK),
    ],
)
def test_activations_are_those_that_are_kept(
    architecture: str, settings: dict[str, Any], tmp_path: Path, kernels_of_gpus: None
) -> None:
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8}
    shape |= {"head_dim": 32} if architecture == "qwen3" else {}
    model = make_tiny_model(tmp_path / "model", architecture, num_hidden_layers=4, **shape)
    args = settings_for(model, **settings)
    backend: Any = make_megatron(args, megatron_args={"bias_activation_fusion": True}, **settings)
    backend.load()
    found = kept_bytes_of_a_token(backend, args, tmp_path)
    stage = stages(read_shape(str(model)), args)[0]
    at_work = settings.get("recompute_num_layers", 0) if settings is not BLOCK else 1
    size = size_of(model)
    layer = layer_activation_bytes(size, compute_bytes=4, is_compiled=True) + 4 * 8 * 32
    expected = activations(size, stage, args, LOAD) / LOAD.micro_batch_tokens - at_work * layer
    assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("q_rank", [96, None])
@pytest.mark.parametrize("value_width", [16, 24])  # narrower than queries and keys, and as wide
def test_activations_of_latent_attention_are_those_that_are_kept(
    q_rank: int | None, value_width: int, tmp_path: Path, kernels_of_gpus: None
) -> None:
    latent = {"q_lora_rank": q_rank, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
    shape = {"hidden_size": 128, "intermediate_size": 320, "first_k_dense_replace": 4, "v_head_dim": value_width}
    write_tiny_model("deepseek_v3", tmp_path / "model", vocab_size=320, num_attention_heads=8, **latent, **shape)
    args = settings_for(tmp_path / "model")
    backend: Any = make_megatron(args, megatron_args={"bias_activation_fusion": True})
    backend.load()
    found = kept_bytes_of_a_token(backend, args, tmp_path)
    stage = stages(read_shape(args.hf_checkpoint), args)[0]
    size = dataclasses.replace(size_of(tmp_path / "model"), num_chosen=0)  # all layers are dense
    expected = activations(size, stage, args, LOAD) / LOAD.micro_batch_tokens
    assert found == pytest.approx(expected, rel=0.005)


# --- several ranks

PIPELINE = {"pipeline_model_parallel_size": 2}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": PIPELINE | {"decoder_first_pipeline_num_layers": 1},
    "experts": {"expert_model_parallel_size": 2},
    "optimizer": {"use_distributed_optimizer": True},
}


def two_ranks_body(model: Path, work: Path) -> None:
    with megatron_on_cpu():
        for name, parallel in TWO_RANKS.items():
            args = settings_for(model, bf16=True)
            backend = make_megatron(args, **parallel)
            backend.load()
            two_rollouts(backend, args, work)
            torch.save(held_bytes(backend), work / f"{name}_{dist.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_ranks_hold_the_shares_that_are_estimated(family: str, tmp_path: Path) -> None:
    model, shape = tmp_path / "model", {"num_hidden_layers": 3, "tie_word_embeddings": family == "qwen3_moe"}
    write_tiny_model(family, model, vocab_size=320, **shape)
    run_ranks(two_ranks_body, 2, model, tmp_path, store=tmp_path / "store")
    for name, parallel in TWO_RANKS.items():
        args = settings_for(model, actor_num_gpus_per_node=2, **parallel)
        for rank in range(2):
            held = torch.load(tmp_path / f"{name}_{rank}.pt")
            number = rank if name == "pipeline" else 0
            expected = estimated(args, dtype=torch.bfloat16, number=number, num_ranks=2)
            assert held["weights"] == expected["weights"]
            padding = 0.05 if name == "optimizer" else 0.0  # buckets that ranks share are aligned
            for kind in ("gradients", "optimizer"):
                assert held[kind] == pytest.approx(expected[kind], rel=padding), (name, rank, kind)


def test_the_stage_that_takes_most_is_the_one_that_counts(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=4)
    args, shape = settings_for(model, **PIPELINE), read_shape(str(model))
    load = dataclasses.replace(LOAD, accumulates=True, num_frozen=2, num_ranks=2)
    found = estimate(shape, size_of(model), args, load)
    first, last = (activations(size_of(model), stage, args, load) for stage in stages(shape, args))
    assert first > 1.9 * last  # two micro-batches on their way
    assert found.parts["activations"] == first
    assert found.frozen == 2 * found.parts["weights"]
    assert found.asleep == found.parts["weights"] + found.parts["optimizer"]
