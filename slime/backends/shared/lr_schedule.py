"""The learning rate as a function of the optimizer step; names and shapes as Megatron-LM's OptimizerParamScheduler."""

from __future__ import annotations

import math

from slime.config import OptimizerConfig


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
