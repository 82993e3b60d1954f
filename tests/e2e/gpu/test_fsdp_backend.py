"""The FSDP backend on one NVIDIA GPU: packed kernels, bfloat16 against float32, sleep and wake."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.tiny_models import make_tiny_model
from torch import nn

from slime.arguments import Args, parse_args
from slime.backends.fsdp_utils.attention import Packing, packed_attention
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.config.run import critic_settings
from slime.data.batch import TrainBatch, batch_from_samples
from slime.training.critic import CriticRecipe
from slime.training.plan import everything
from slime.training.recipe import Recipe
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port
from slime.utils.types import Sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

LENGTHS = [700, 1, 33, 512, 90]
BF16_FLOOR = 2e-2  # of attention outputs near 1 in bfloat16


def per_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention one sequence at a time, in float32. [1, H, N, D] -> [1, N, H, D]."""
    parts = zip(*(tensor.float().split(LENGTHS, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_on_a_gpu_equals_attention_of_each_sequence(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (8, 2, 2)]
    ours = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().float().requires_grad_() for tensor in ours]
    out, _ = packed_attention(nn.Module(), *ours, None, packing=Packing(LENGTHS, torch.device("cuda")))
    reference = per_sequence(*theirs)
    weight = torch.randn_like(reference)
    (out.float() * weight).sum().backward()
    (reference * weight).sum().backward()
    tolerance = BF16_FLOOR if dtype is torch.bfloat16 else 2e-3  # tf32 is off; sums of 700 terms
    assert (out.float() - reference).abs().max() < tolerance
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad.float() - other.grad).norm() < tolerance * other.grad.norm()


@pytest.fixture(scope="module")
def nccl_world() -> Iterator[None]:
    """A world of one rank on NCCL."""
    address = f"127.0.0.1:{find_free_port()}"
    init_process_group(backend="nccl", rank=0, world_size=1, address=address, timeout_minutes=2)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose heads the kernel takes."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, architecture="qwen3", hidden_size=256, head_dim=64, initializer_range=0.02)
    return path


def settings(model: Path, *flags: str) -> Args:
    """A run of one rank."""
    return parse_args(
        f"--train-backend fsdp --hf-checkpoint {model} --prompt-data unread --rollout-batch-size 4 "
        "--n-samples-per-prompt 4 --num-rollout 4 --colocate --actor-num-gpus-per-node 1 --lr 1e-4 "
        "--use-dynamic-batch-size --max-tokens-per-gpu 512 --no-torch-compile".split()
        + list(flags)
    )


def rollout() -> TrainBatch:
    """Four groups of four samples, random tokens and lengths."""
    rng = np.random.default_rng(0)
    samples = []
    prompts = [rng.integers(0, 260, rng.integers(10, 150)).tolist() for _ in range(4)]
    for index in range(16):
        response = rng.integers(0, 260, rng.integers(2, 40)).tolist()
        tokens = prompts[index // 4] + response
        samples.append(Sample(index=index, group_index=index // 4, tokens=tokens, response_length=len(response)))
    return batch_from_samples(samples, [float(index % 3) for index in range(16)])


def build(args: Args, tmp_path: Path) -> tuple[FSDPBackend, Recipe]:
    """A loaded backend and its recipe."""
    backend = FSDPBackend(args, args, torch.device("cuda", 0))
    backend.load()
    return backend, Recipe(backend, args, args, tmp_path, lambda name: contextlib.nullcontext())


def test_bfloat16_log_probs_stay_near_float32(nccl_world: None, model: Path, tmp_path: Path) -> None:
    half, recipe = build(settings(model), tmp_path)
    full, _ = build(settings(model, "--no-bf16"), tmp_path)
    batches = everything(recipe._prepare(0, rollout()))
    for ours, theirs in zip(
        half.log_probs(batches, "actor", entropy=True), full.log_probs(batches, "actor", entropy=True), strict=True
    ):
        assert (ours.log_probs - theirs.log_probs).abs().mean() < 2e-2
        assert (ours.entropy - theirs.entropy).abs().mean() < 2e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [("--bf16", 2e-2), ("--no-bf16", 1e-4)])
def test_shared_prompts_give_the_log_probs_and_the_gradient_of_separate_ones(
    nccl_world: None, model: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    flags = (dtype, "--max-tokens-per-gpu", "4096")
    shared, recipe = build(settings(model, *flags), tmp_path)
    separate, other_recipe = build(settings(model, *flags, "--no-share-prompts"), tmp_path)
    batches = everything(recipe._prepare(0, rollout()))
    for ours, theirs in zip(
        shared.log_probs(batches, "actor", entropy=False),
        separate.log_probs(batches, "actor", entropy=False),
        strict=True,
    ):
        assert (ours.log_probs - theirs.log_probs).abs().mean() < tolerance
    ours, theirs = recipe.train(0, rollout()), other_recipe.train(0, rollout())
    assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=tolerance)


def test_a_critic_trains_beside_a_sleeping_actor(nccl_world: None, model: Path, tmp_path: Path) -> None:
    args = settings(model, "--advantage-estimator", "ppo", "--critic-lr", "1e-3", "--normalize-advantages")
    actor, recipe = build(args, tmp_path)
    run = critic_settings(args)
    backend = FSDPBackend(run, args, torch.device("cuda", 0), role="critic")
    backend.load()
    critic = CriticRecipe(backend, args, run, lambda name: contextlib.nullcontext())
    batch = rollout()
    losses = []
    for step in range(4):
        actor.sleep()
        update = critic.train(step, batch)
        losses.append(update.metrics["train/value_loss"])
        actor.wake_up()
        recipe.train(step, dataclasses.replace(batch, values=update.values))
    assert losses[-1] < losses[0]


def test_a_training_step_after_sleep_and_wake_up_equals_one_without(
    nccl_world: None, model: Path, tmp_path: Path
) -> None:
    batch = rollout()
    metrics = []
    for naps in (False, True):
        backend, recipe = build(settings(model, "--no-bf16"), tmp_path)
        recipe.train(0, batch)
        if naps:
            in_use = torch.cuda.memory_allocated()
            backend.sleep()
            assert torch.cuda.memory_allocated() < in_use
            backend.wake_up()
        metrics.append(recipe.train(1, batch))
    assert metrics[0]["train/loss"] == pytest.approx(metrics[1]["train/loss"], abs=1e-6)
    assert metrics[0]["train/grad_norm"] == pytest.approx(metrics[1]["train/grad_norm"], rel=1e-5)


def test_a_checkpoint_of_a_gpu_loads_again(nccl_world: None, model: Path, tmp_path: Path) -> None:
    args = settings(model, "--save", str(tmp_path / "save"), "--save-hf", str(tmp_path / "hf"))
    backend, recipe = build(args, tmp_path)
    recipe.train(0, rollout())
    backend.save(0)
    again = FSDPBackend(settings(model, "--load", str(tmp_path / "save")), args, torch.device("cuda", 0))
    assert again.load() == 1
    for (name, saved), (_, loaded) in zip(backend.hf_tensors(), again.hf_tensors(), strict=True):
        assert torch.equal(saved, loaded), name


@pytest.mark.parametrize("recompute", [[], ["--gradient-checkpointing"]])
def test_compiled_layers_train_as_plain_ones(
    nccl_world: None, model: Path, tmp_path: Path, recompute: list[str]
) -> None:
    metrics = []
    for flag in ("--no-torch-compile", "--torch-compile"):
        _, recipe = build(settings(model, "--no-bf16", flag, *recompute), tmp_path)
        metrics.append([recipe.train(step, rollout()) for step in range(3)])
    for plain, compiled in zip(*metrics, strict=True):
        assert compiled["train/loss"] == pytest.approx(plain["train/loss"], abs=1e-5)
        assert compiled["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=1e-4)


def test_asleep_nothing_but_what_kernels_keep_is_left_on_the_gpu(nccl_world: None, model: Path, tmp_path: Path) -> None:
    backend, recipe = build(settings(model), tmp_path)
    recipe.train(0, rollout())
    others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in backend._tensors() if tensor.is_cuda)
    backend.sleep()
    assert torch.cuda.memory_allocated() <= others + 1024
    backend.wake_up()
