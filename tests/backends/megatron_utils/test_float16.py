"""--fp16: Megatron's float32 weights beside float16 ones, and its loss scale, which does what FSDP's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.megatron_cpu import megatron_on_cpu
from helpers.megatron_training import equal, make_megatron, two_rollouts
from helpers.tiny_models import make_tiny_model
from helpers.training import full_weights, make_backend, make_recipe, random_batch, run_ranks, settings_for

from slime.data.packed import PackedBatch, pack_rows
from slime.training.backend import LossOutput, StepMetrics, TokenOutputs, Wants

FP16: dict[str, Any] = {"fp16": True, "adam_eps": 1e-4, "lr": 1e-3}
DISTRIBUTED = {"use_distributed_optimizer": True}
WAYS: list[dict[str, Any]] = [{}, DISTRIBUTED, {"ckpt_format": "torch"}, {"ckpt_format": "torch", **DISTRIBUTED}]


def loaded(model: Path, parallel: dict[str, Any] | None = None, **settings: Any) -> Any:
    backend = make_megatron(settings_for(model, **FP16 | settings), **parallel or {})
    backend.load()
    return backend


def likelihood(outputs: TokenOutputs, batch: PackedBatch, sequence_sum: Any) -> LossOutput:
    return LossOutput(-(batch.loss_weights * outputs.log_probs).sum(), {})


def step(backend: Any, loss: Any = likelihood, seed: int = 0) -> StepMetrics:
    batch = random_batch(seed=seed)
    weights = batch.loss_mask / batch.loss_mask.sum()
    rows = range(backend.layout.data_rank, len(batch), backend.layout.data_size)
    result: StepMetrics = backend.train_step([pack_rows(batch, rows, weights)], loss, wants=Wants())
    return result


def scales_of(backend: Any) -> list[float]:
    from slime.backends.megatron_utils.optimizer import scalers_of

    return [float(scaler.scale) for scaler in scalers_of(backend.optimizer)]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_it_trains_as_fsdp_in_float16_and_nearly_as_in_float32(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture)
    args = settings_for(model, **FP16)
    ours, theirs, full = (
        make_megatron(args),
        make_backend(args),
        make_megatron(settings_for(model, **FP16 | {"fp16": False})),
    )
    found = []
    for backend in (ours, theirs, full):
        backend.load()
        found.append(two_rollouts(backend, args, tmp_path))  # type: ignore[arg-type]
    for other in found[1:]:
        for name in ("train/grad_norm", "train/loss"):
            ours_of_it, theirs_of_it = ([m[name] for m in run.metrics] for run in (found[0], other))
            assert ours_of_it == pytest.approx(theirs_of_it, rel=0.02, abs=2e-3)
        for name, tensor in found[0].weights.items():  # all moved by up to 2e-3; norms are rounded to 1e-3
            assert (tensor - other.weights[name]).abs().mean() < 3e-4, name
    assert {tensor.dtype for tensor in ours.chunk.weights().values()} == {torch.float16}  # type: ignore[attr-defined]


@pytest.mark.parametrize("parallel", [{}, DISTRIBUTED])
def test_a_gradient_that_overflows_skips_its_step_and_halves_the_scale(parallel: dict[str, Any], model: Path) -> None:
    backend = loaded(model, parallel, initial_loss_scale=2.0**24)
    weights = full_weights(backend)
    result = step(backend)
    assert (result.skipped, result.overflowed, result.loss_scale) == (True, True, 2.0**24)
    assert equal(full_weights(backend), weights)
    assert scales_of(backend) == [2.0**23]
    results = [step(backend) for _ in range(16)]
    assert not results[-1].skipped
    num_overflows = sum(result.overflowed for result in results)
    assert [result.loss_scale for result in results if result.overflowed] == [
        2.0 ** (23 - i) for i in range(num_overflows)
    ]


def test_overflows_do_not_count_as_skipped_steps(model: Path, tmp_path: Path) -> None:
    args = settings_for(model, **FP16, initial_loss_scale=2.0**30, max_skipped_steps=0)
    backend = make_megatron(args)
    backend.load()
    recipe = make_recipe(backend, args, tmp_path)  # type: ignore[arg-type]
    metrics = [recipe.train(number, random_batch(seed=number)) for number in range(3)]
    assert [m["train/overflowed_steps"] for m in metrics] == [1, 1, 1]
    assert [m["train/loss_scale"] for m in metrics] == [2.0**30, 2.0**29, 2.0**28]
    assert recipe.num_skipped == 0


def test_a_loss_that_is_not_finite_counts_and_leaves_the_scale(model: Path) -> None:
    backend = loaded(model)
    nan = torch.tensor(float("nan"))
    result = step(backend, lambda *args: LossOutput(likelihood(*args).loss + nan, {}))
    assert (result.skipped, result.overflowed) == (True, False)
    assert scales_of(backend) == [65536.0]


@pytest.mark.parametrize("parallel", WAYS)
def test_a_checkpoint_brings_the_loss_scale_back(parallel: dict[str, Any], model: Path, tmp_path: Path) -> None:
    scale = {"initial_loss_scale": 1024.0, "loss_scale_window": 3}
    backend = loaded(model, parallel, save=str(tmp_path), async_save=True, **scale)
    for _ in range(4):
        step(backend)
    backend.save(0)
    backend.finish_save()
    again = loaded(model, parallel, load=str(tmp_path), loss_scale_window=3)
    assert scales_of(again) == [2048.0]
    results = [(step(again), step(backend)) for _ in range(2)]
    assert all(ours == theirs for ours, theirs in results)
    assert scales_of(again) == scales_of(backend) == [4096.0]
    assert equal(full_weights(again), full_weights(backend))


LAYOUTS: list[dict[str, Any]] = [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, DISTRIBUTED]


def two_ranks(model: Path, moe: Path, work: Path) -> None:
    with megatron_on_cpu():
        for number, parallel in enumerate(LAYOUTS):
            backend = loaded(model, parallel, initial_loss_scale=2.0**26, actor_num_gpus_per_node=2)
            results = [step(backend, seed=seed) for seed in range(12)]
            torch.save([results, scales_of(backend)], work / f"{number}_{dist.get_rank()}.pt")
        overflow_in_an_expert(moe)


def overflow_in_an_expert(moe: Path) -> None:
    """Megatron has an optimizer and a scaler for shared experts and for the rest: that of one sees nothing here."""
    parallel = {"expert_model_parallel_size": 2}
    backend = loaded(moe, parallel, initial_loss_scale=1024.0, actor_num_gpus_per_node=2)
    assert scales_of(backend) == [1024.0, 1024.0]
    for name, parameter in backend.chunk.lms[0].named_parameters():
        if ".experts." in name and dist.get_rank() == 1:
            parameter.register_hook(lambda gradient: gradient * float("inf"))
    assert step(backend).overflowed
    assert scales_of(backend) == [512.0, 512.0]


def comparable(results: list[StepMetrics]) -> list[tuple[Any, ...]]:
    """Without norms, of which those of overflows are NaN."""
    return [(result.metrics["loss"], result.skipped, result.overflowed, result.loss_scale) for result in results]


@pytest.mark.slow
def test_ranks_agree_on_what_overflowed(model: Path, tmp_path: Path) -> None:
    moe = make_tiny_model(tmp_path / "moe", "qwen3_moe")
    run_ranks(two_ranks, 2, model, moe, tmp_path, store=tmp_path / "store")
    one = loaded(model, initial_loss_scale=2.0**26)
    expected = [step(one, seed=seed) for seed in range(12)]
    for number in range(len(LAYOUTS)):
        ranks = [torch.load(tmp_path / f"{number}_{rank}.pt", weights_only=False) for rank in (0, 1)]
        (first, scales), (second, other_scales) = ranks
        assert comparable(first) == comparable(second)
        assert scales == other_scales
        assert first[0].overflowed
        assert not first[-1].skipped
        assert first[-1].grad_norm == pytest.approx(expected[-1].grad_norm, rel=0.05)
