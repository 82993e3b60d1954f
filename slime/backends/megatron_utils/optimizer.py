"""Megatron's optimizer, with a step that is skipped where a gradient is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from torch import nn

from slime.backends.megatron_utils.adam import apply_group_step_adam

_MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "step"}


def make_optimizer(
    config: MegatronOptimizerConfig, models: list[nn.Module], *, host_share: float = 0.0
) -> MegatronOptimizer:
    """models: wrapped, with the weights to start from: half-precision ones get float32 copies now.

    host_share: of Adam's moments, that which is kept on the host.
    """
    apply_group_step_adam(is_needed=host_share > 0)
    by_shape = getattr(megatron_optimizer, "get_standard_config_overrides", None)  # before 0.16 that is the default
    options = {} if by_shape is None else {"config_overrides": by_shape(config)}
    optimizer = get_megatron_optimizer(config, models, **options)
    if config.optimizer == "sgd":
        for part in parts_of(optimizer):
            part.init_state_fn = _start_momentum
    if host_share > 0:
        for part in parts_of(optimizer):
            part.optimizer.keep_on_host(host_share)
    return optimizer


def _start_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """What a checkpoint's momentum is loaded into; Megatron makes none for SGD."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_rates(optimizer: MegatronOptimizer, *, lr: float, weight_decay: float) -> None:
    """Those of the next step; weight decay is for matrices, which Megatron leaves to its schedule to know."""
    for group in optimizer.param_groups:
        group |= {"lr": lr, "weight_decay": weight_decay * group.get("wd_mult", 1.0)}


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Moments of zero where no step has been taken yet, such as the actor's while only the critic learns: whoever loads
    a checkpoint looks for them."""
    for part in parts_of(optimizer):
        if part.optimizer is not None and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron keeps one optimizer for dense parameters and one for experts."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if part.optimizer is not None]  # a rank may hold nothing that is trained


def scalers_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Each part's loss scale; [] where the loss is not scaled."""
    return [part.grad_scaler for part in parts_of(optimizer) if getattr(part, "grad_scaler", None) is not None]


class Step(NamedTuple):
    """One optimizer step, as `StepMetrics` reports it. grad_norm: before clipping."""

    grad_norm: float
    skipped: bool
    loss_scale: float | None
    overflowed: bool


@torch.no_grad()
def forget(optimizer: MegatronOptimizer) -> None:
    """Moments and step counts back to 0, in place."""
    for part in parts_of(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] *= 0  # a number, or a tensor
        for state in part.optimizer.state.values():
            for name in _MOMENTS & state.keys():
                state[name].zero_()


@torch.no_grad()
def step_if_finite(optimizer: MegatronOptimizer, *, clip_grad: float, is_loss_finite: bool) -> Step:
    """One update, gradients clipped to norm `clip_grad` (0: not); none where the loss or the norm is not finite."""
    scalers = scalers_of(optimizer)
    before = scalers[0].state_dict() if scalers else {}
    scale = float(scalers[0].scale) if scalers else None
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    overflowed = is_loss_finite and not math.isfinite(norm) and _can_shrink(scalers)
    for scaler in scalers:  # each has looked at its own part of the gradient alone, and at what a smaller scale mends
        scaler.load_state_dict(before)
        scaler.update(overflowed)
    if not (is_loss_finite and math.isfinite(norm)):
        return Step(norm, True, scale, overflowed)
    if clip_grad > 0:
        for part in parts_of(optimizer):
            if parameters := part.get_parameters():
                is_apart = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, use_decoupled_grad=is_apart)
    optimizer.step_with_ready_grads()
    return Step(norm, False, scale, False)


def _can_shrink(scalers: list[Any]) -> bool:
    return bool(scalers) and isinstance(scalers[0], DynamicGradScaler) and bool(scalers[0].scale > scalers[0].min_scale)


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Float32 weights and moments, wherever Megatron keeps them."""
    for part in parts_of(optimizer):
        for group in part.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def without_reduction(models: list[Any]) -> Iterator[None]:
    """Backward passes that add up gradients on this rank alone: with overlap all micro-batches but the last."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
        yield


def gradient_buffers(models: list[Any]) -> Iterator[torch.Tensor]:
    """The memory in which Megatron adds up gradients. models: wrapped in its DistributedDataParallel."""
    for model in models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            yield buffer.grad_data
