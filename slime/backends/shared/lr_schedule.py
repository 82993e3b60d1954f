"""Learning rate and weight decay by optimizer step; names and shapes as Megatron-LM's OptimizerParamScheduler."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, TypeVar

from slime.config import OptimizerConfig

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=OptimizerConfig)
_OF_WARMUP = ("lr", "lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_init", "lr_decay_style")
_OF_DECAY = ("min_lr", "lr_decay_iters", "lr_wsd_decay_iters", "lr_wsd_decay_style")


def schedule_of(cfg: OptimizerConfig, total_steps: int) -> dict[str, Any]:
    """The schedule of a run of `total_steps` as settings, for its checkpoints."""
    settings = {name: getattr(cfg, name) for name in _OF_WARMUP + _OF_DECAY}
    return settings | {"lr_decay_iters": cfg.lr_decay_iters or total_steps}


def continued(cfg: ConfigT, saved: dict[str, Any] | None, total_steps: int) -> ConfigT:
    """`cfg` with the schedule that counts for a run that continues: the settings', or that of its checkpoint, `saved`.

    Warns where the settings' differs and nobody said that it may.
    """
    if saved is None:
        return cfg
    if cfg.use_checkpoint_lr_scheduler:
        return replace(cfg, **saved)
    given = schedule_of(cfg, total_steps)
    is_constant = given["lr_decay_style"] == saved["lr_decay_style"] == "constant"
    names = [name for name in (_OF_WARMUP if is_constant else _OF_WARMUP + _OF_DECAY) if given[name] != saved[name]]
    if names and not cfg.override_lr_scheduler:
        changes = ", ".join(f"{name} {given[name]} (was {saved[name]})" for name in names)
        logger.warning("the schedule is not the checkpoint's: %s. See --use-checkpoint-lr-scheduler", changes)
    return cfg


def learning_rate(step: int, cfg: OptimizerConfig, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of a run of `total_steps`."""
    decay_steps = cfg.lr_decay_iters or total_steps
    warmup_steps = cfg.lr_warmup_iters
    if cfg.lr_warmup_fraction is not None:
        warmup_steps = int(cfg.lr_warmup_fraction * decay_steps)
    if step < warmup_steps:
        return cfg.lr_warmup_init + (cfg.lr - cfg.lr_warmup_init) * (step + 1) / warmup_steps
    if cfg.lr_decay_style == "constant":
        return cfg.lr
    if step >= decay_steps:
        return cfg.min_lr
    if cfg.lr_decay_style == "inverse-square-root":
        return max(cfg.min_lr, cfg.lr * math.sqrt(max(warmup_steps, 1) / max(step, 1)))
    if cfg.lr_decay_style == "WSD":
        return cfg.min_lr + _wsd_factor(step, cfg, decay_steps) * (cfg.lr - cfg.min_lr)
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    factor = 1 - progress if cfg.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + factor * (cfg.lr - cfg.min_lr)


def weight_decay(step: int, cfg: OptimizerConfig, total_steps: int) -> float:
    """That of optimizer step `step` (from 0) of a run of `total_steps`, for what decays at all."""
    if cfg.weight_decay_incr_style == "constant":
        return cfg.weight_decay
    assert cfg.start_weight_decay is not None
    assert cfg.end_weight_decay is not None
    progress = min(1.0, step / total_steps)
    factor = progress if cfg.weight_decay_incr_style == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return cfg.start_weight_decay + factor * (cfg.end_weight_decay - cfg.start_weight_decay)


def _wsd_factor(step: int, cfg: OptimizerConfig, decay_steps: int) -> float:
    """1 while stable, then down to 0 over the last `lr_wsd_decay_iters` steps."""
    length = cfg.lr_wsd_decay_iters or max(1, decay_steps // 10)
    progress = (step - (decay_steps - length)) / length
    if progress <= 0:
        return 1.0
    shapes = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": 2 * 0.5**progress - 1,
        "minus_sqrt": 1 - math.sqrt(progress),
    }
    return shapes[cfg.lr_wsd_decay_style]
