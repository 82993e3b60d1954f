"""AdamW as Megatron wants it: with moments on the host, or where neither Transformer Engine nor Apex brings one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from slime.backends.megatron_utils.host_moments import NAMES, HostMoments, within


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW that counts steps by parameter group, not by parameter. Moments are on the device, or some on the host."""

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
            raise ValueError("weight decay that is not decoupled needs the Adam of Transformer Engine or Apex")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._on_host: set[Tensor] = set()
        self._moments: list[HostMoments] = []  # of each group

    def keep_on_host(self, share: float) -> None:
        """From now on moments of `share` of the values are on the host, and all of them exist. Before the first step.

        Parameters stay those that they are now. Raises MemoryError where the host has no room.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        self._on_host = set(within(params, share))
        self._start([param for param in params if param not in self._on_host])
        for group in self.param_groups:
            self._moments.append(HostMoments([param for param in group["params"] if param in self._on_host]))
            self.state.update(self._moments[-1].states())

    def _start(self, params: list[Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {name: torch.zeros_like(param) for name in NAMES}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for number, group in enumerate(self.param_groups):
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None and param.numel()]
            if on_device := [param for param in params if param not in self._on_host]:
                self._update(on_device, group)
            if self._moments:
                self._moments[number].update(functools.partial(_adamw, group=group))

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        self._start(params)
        moments = [[self.state[param][name] for param in params] for name in NAMES]
        _adamw(params, [param.grad for param in params], *moments, group=group)  # type: ignore[misc]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that moments on the host stay where they are and are overwritten there."""
        kept = {param: state for param, state in self.state.items() if param in self._on_host}
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        of_host = {number: kept[param] for number, param in zip(numbers, params, strict=True) if param in kept}
        loaded = state_dict["state"]
        super().load_state_dict(state_dict | {"state": {key: loaded[key] for key in loaded.keys() - of_host.keys()}})
        self.state.update(kept)
        for number in of_host.keys() & loaded.keys():
            for name, moment in of_host[number].items():
                if loaded[number][name] is not moment:
                    moment.copy_(loaded[number][name])


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    group: dict[str, Any],
) -> None:
    """The update of step `group["step"]`, in place."""
    steps_before = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
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


def apply_group_step_adam(*, is_needed: bool = False) -> None:
    """Make Megatron-core (0.16 to 0.20) take `GroupStepAdamW` where it would fall back to torch's AdamW.

    is_needed: also where Transformer Engine or Apex brings another.

    Its distributed optimizer is written for optimizers that keep `step` in their groups. With torch's, a load before
    the first step asserts, a load gives all parameters one and the same step tensor, which each of them then
    increments, and the `torch` format raises KeyError.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.Adam is GroupStepAdamW or (distrib_optimizer.HAVE_APEX_OR_TE and not is_needed):
        return
    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    # In float32 parameters are leaves of which views are written.
    kind = distrib_optimizer.DistributedOptimizer
    for name in ("load_state_dict", "load_parameter_state"):
        setattr(kind, name, functools.wraps(getattr(kind, name))(torch.no_grad()(getattr(kind, name))))
