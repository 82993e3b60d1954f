"""AdamW as Megatron wants it, where neither Transformer Engine nor Apex brings one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW that counts steps by parameter group, not by parameter."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        """options: those of other FusedAdams, of which one would change the maths: adam_w_mode False."""
        if not options.get("adam_w_mode", True):
            raise ValueError("weight decay that is not decoupled needs Transformer Engine or Apex")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        steps_before = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
        adamw(
            params,
            [param.grad for param in params],  # type: ignore[misc]
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            list(steps_before.unbind()),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def apply_group_step_adam() -> None:
    """Make Megatron-core (0.16 to 0.20) take `GroupStepAdamW` where it would fall back to torch's AdamW.

    Its distributed optimizer is written for optimizers that keep `step` in their groups. With torch's, a load before
    the first step asserts, a load gives all parameters one and the same step tensor, which each of them then
    increments, and the `torch` format raises KeyError.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    # In float32 parameters are leaves of which views are written.
    kind = distrib_optimizer.DistributedOptimizer
    for name in ("load_state_dict", "load_parameter_state"):
        setattr(kind, name, functools.wraps(getattr(kind, name))(torch.no_grad()(getattr(kind, name))))
