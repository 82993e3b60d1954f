"""The Megatron backend on one NVIDIA GPU: attention of segments, bfloat16 against FSDP, sleep and wake, resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_tiny_model

from slime.arguments import Args, parse_args
from slime.backends.fsdp_utils.backend import FSDPBackend
from slime.backends.megatron_utils.start import open_backend
from slime.data.batch import TrainBatch, batch_from_samples
from slime.training.backend import TrainBackend
from slime.training.plan import everything
from slime.training.recipe import Recipe
from slime.utils.distributed import init_process_group
from slime.utils.http_utils import find_free_port
from slime.utils.types import Sample

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda", 0)
LENGTHS = [704, 4, 36, 512, 92]


@pytest.mark.parametrize("widths", [(64, 64), (192, 128), (20, 36)])
@pytest.mark.parametrize("context_rank", [0, 1])
def test_the_kernel_aligns_the_queries_of_a_context_parallel_rank_with_the_end_of_their_keys(
    context_rank: int, widths: tuple[int, int]
) -> None:
    """widths: of keys, and of values, which latent attention has narrower."""
    from slime.backends.megatron_utils.attention import _by_segment, _lengths
    from slime.backends.megatron_utils.packing import Split, _packing
    from slime.backends.shared.varlen import varlen_attention

    packing = _packing(LENGTHS, Split(context_rank, 2), GPU, on_device=False)
    num_queries, num_keys = (sum(lengths) for lengths in zip(*packing.segments, strict=True))
    torch.manual_seed(0)
    width, value_width = widths
    shapes = [(num_queries, 8, width), (num_keys, 2, width), (num_keys, 2, value_width)]
    ours = [torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().float().requires_grad_() for tensor in ours]
    out = varlen_attention(*ours, _lengths(packing), scale=None)
    reference = _by_segment(*theirs, packing.segments, None, 0.0)
    weight = torch.randn_like(reference)
    (out.float() * weight).sum().backward()
    (reference * weight).sum().backward()
    assert (out.float() - reference).abs().max() < 3e-2
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad.float() - other.grad).norm() < 2e-2 * other.grad.norm()


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
    return make_tiny_model(
        path, architecture="qwen3", hidden_size=256, head_dim=64, initializer_range=0.02, dtype="bfloat16"
    )


def settings(model: Path, backend: str, *flags: str) -> Args:
    """A run of one rank."""
    return parse_args(
        f"--train-backend {backend} --hf-checkpoint {model} --prompt-data unread --rollout-batch-size 4 "
        "--n-samples-per-prompt 4 --num-rollout 4 --colocate --actor-num-gpus-per-node 1 --lr 1e-4 "
        "--use-dynamic-batch-size --max-tokens-per-gpu 512 --no-torch-compile".split()
        + list(flags)
    )


def rollout(seed: int = 0) -> TrainBatch:
    """Four groups of four samples, random tokens and lengths."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(16):
        prompt, response = rng.integers(0, 260, rng.integers(10, 150)), rng.integers(0, 260, rng.integers(2, 40))
        tokens = prompt.tolist() + response.tolist()
        samples.append(Sample(index=index, group_index=index // 4, tokens=tokens, response_length=len(response)))
    return batch_from_samples(samples, [float(index % 3) for index in range(16)])


def recipe_of(backend: TrainBackend, args: Args, folder: Path) -> Recipe:
    return Recipe(backend, args, args, folder, lambda name: contextlib.nullcontext())


def megatron(args: Args) -> TrainBackend:
    return open_backend(args, args, GPU)


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3, dense: rounding would have the two backends choose other experts."""
    options = {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "first_k_dense_replace": 2}
    path = tmp_path_factory.mktemp("latent")
    return make_tiny_model(path, "deepseek_v3", hidden_size=256, initializer_range=0.02, dtype="bfloat16", **options)


@pytest.mark.parametrize("which", ["model", "latent"])
def test_megatron_and_fsdp_see_the_same_in_bfloat16(
    nccl_world: None, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(which)
    args, other = settings(model, "megatron", "--use-distributed-optimizer"), settings(model, "fsdp")
    ours, theirs = megatron(args), FSDPBackend(other, other, GPU)
    assert ours.load() == theirs.load() == 0
    ours_recipe, theirs_recipe = recipe_of(ours, args, tmp_path), recipe_of(theirs, other, tmp_path)
    batches = everything(theirs_recipe._prepare(0, rollout()))
    for found, expected in zip(
        ours.log_probs(batches, "actor", entropy=True), theirs.log_probs(batches, "actor", entropy=True), strict=True
    ):
        assert (found.log_probs - expected.log_probs).abs().mean() < 2e-2
        assert (found.entropy - expected.entropy).abs().mean() < 2e-2
    mine, reference = ours_recipe.train(0, rollout()), theirs_recipe.train(0, rollout())
    assert mine["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=3e-2)


@pytest.mark.parametrize("optimizer", ["--use-distributed-optimizer", "--no-use-distributed-optimizer"])
def test_a_night_changes_nothing_and_gives_the_memory_back(
    nccl_world: None, model: Path, tmp_path: Path, optimizer: str
) -> None:
    args = settings(model, "megatron", optimizer)
    norms = []
    for sleeps in (False, True):
        backend = megatron(args)
        backend.load()
        recipe = recipe_of(backend, args, tmp_path)
        recipe.train(0, rollout())
        if sleeps:
            awake = {name: tensor.cpu() for name, tensor in backend.hf_tensors()}
            in_use = torch.cuda.memory_allocated()
            backend.sleep()
            given_back = in_use - torch.cuda.memory_allocated()
            assert given_back >= 6 * sum(tensor.nbytes for tensor in awake.values())  # of 2 bytes each
            asleep = {name: tensor.cpu() for name, tensor in backend.hf_tensors()}
            assert all(torch.equal(tensor, asleep[name]) for name, tensor in awake.items())
            backend.wake_up()
        norms.append(recipe.train(1, rollout(1))["train/grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)  # kernels add in any order


@pytest.mark.parametrize(("dtype", "tolerance"), [("--bf16", 2e-2), ("--no-bf16", 1e-4)])
@pytest.mark.parametrize(
    "recompute",
    [[], ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]],
)
def test_compiled_layers_train_as_plain_ones(
    nccl_world: None, model: Path, tmp_path: Path, dtype: str, tolerance: float, recompute: list[str]
) -> None:
    metrics = []
    for flag in ("--no-torch-compile", "--torch-compile"):
        args = settings(model, "megatron", dtype, flag, *recompute)
        backend = open_backend(args, args, GPU, torch_compile=args.torch_compile)
        backend.load()
        assert backend.is_compiled == (flag == "--torch-compile")
        recipe = recipe_of(backend, args, tmp_path)
        metrics.append([recipe.train(step, rollout(step)) for step in range(3)])
    for plain, compiled in zip(*metrics, strict=True):
        assert compiled["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=tolerance)


OFFLOAD = "--optimizer-cpu-offload"


@pytest.mark.parametrize(
    "way",
    [
        [],
        ["--async-save"],
        ["--ckpt-format", "torch"],
        ["--fp16", "--async-save"],
        [OFFLOAD, "--async-save"],
        [OFFLOAD, "--ckpt-format", "torch", "--no-use-distributed-optimizer"],
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_where_it_was_written(
    nccl_world: None, model: Path, tmp_path: Path, way: list[str]
) -> None:
    flags = ["--use-distributed-optimizer", *way, "--save", str(tmp_path / "save")]
    args = settings(model, "megatron", *flags)
    backend = megatron(args)
    backend.load()
    recipe = recipe_of(backend, args, tmp_path)
    recipe.train(0, rollout())
    backend.save(0)
    saved = {name: tensor.cpu() for name, tensor in backend.hf_tensors()}
    backend.sleep()
    backend.wake_up()
    expected = recipe.train(1, rollout(1))  # with --async-save while the checkpoint is written
    backend.finish_save()
    again = settings(model, "megatron", *flags, "--load", str(tmp_path / "save"))
    resumed = megatron(again)
    assert resumed.load() == 1
    assert all(torch.equal(tensor.cpu(), saved[name]) for name, tensor in resumed.hf_tensors())
    found = recipe_of(resumed, again, tmp_path).train(1, rollout(1))
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-3)


def test_float16_finds_its_scale_and_trains_near_float32(nccl_world: None, model: Path, tmp_path: Path) -> None:
    half, full = settings(model, "megatron", "--fp16"), settings(model, "megatron", "--no-bf16")
    recipes = []
    for args in (half, full):
        backend = megatron(args)
        backend.load()
        recipes.append(recipe_of(backend, args, tmp_path))
    for step in range(3):
        ours, theirs = (recipe.train(step, rollout()) for recipe in recipes)
        assert ours["train/overflowed_steps"] == ours["train/skipped_steps"] == 0
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=3e-2)
    large = settings(model, "megatron", "--fp16", "--initial-loss-scale", str(2.0**36))
    backend = megatron(large)
    backend.load()
    recipe = recipe_of(backend, large, tmp_path)
    overflows = [recipe.train(step, rollout())["train/overflowed_steps"] for step in range(30)]
    assert (overflows[0], overflows[-1]) == (1, 0)
    assert recipe.num_skipped == 0
