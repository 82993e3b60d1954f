"""What a step of the optimizer is made of: which parameters move, AdamW, clipping, float16's loss scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slime.backends.shared.trained_parameters import trained_names
from slime.config import OptimizerConfig


def freeze(lm: nn.Module, cfg: OptimizerConfig) -> None:
    """Take the parameters that the settings leave out from training, by name. Raises ValueError where none is meant."""
    named = dict(lm.named_parameters())
    trained = trained_names(dict.fromkeys(named, ()), cfg)
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)


def adamw(model: nn.Module, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW on what is trained of `model`, with weight decay on matrices only, as is usual for transformers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices_first = sorted(trained, key=is_decayed, reverse=True)
    groups = [
        {"params": list(members), "weight_decay": cfg.weight_decay if is_matrix else 0.0}
        for is_matrix, members in itertools.groupby(matrices_first, key=is_decayed)
    ]
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.adam_eps, fused=True)


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay is for it: for matrices, not for norms and biases."""
    return parameter.ndim >= 2


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer) -> None:
    """Moments and step counts back to 0, in place."""
    for entry in optimizer.state.values():
        for value in entry.values():
            if isinstance(value, Tensor):
                value.zero_()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, scale: float = 1.0) -> float:
    """Divide gradients by the loss scale, then bring their norm down to `max_norm` (0: leave it). Returns the norm."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1.0 and gradients:
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], 1 / scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


@dataclass
class LossScale:
    """What the loss is multiplied by so that float16 gradients do not vanish; halves where one overflows.

    window: steps without an overflow after which it doubles; 0: never. A power of two: float32 divides by it exactly.
    """

    value: float = 1.0
    window: int = 0
    num_good: int = 0  # steps since the last change

    def explains(self, *, loss: float, grad_norm: float) -> bool:
        """Whether a smaller scale may be what a step needs: its gradient is not finite, though its loss is."""
        numbers = torch.tensor([loss, grad_norm]).isfinite().tolist()
        return numbers == [True, False] and self.value > 1.0

    def update(self, *, overflowed: bool) -> None:
        """After each step."""
        self.num_good = 0 if overflowed else self.num_good + 1
        if overflowed:
            self.value /= 2
        elif self.num_good == self.window:
            self.value, self.num_good = self.value * 2, 0
