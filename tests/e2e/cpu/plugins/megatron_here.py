"""Megatron in a process without GPUs, and hooks that write down when they were called."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_until_the_end = ExitStack()


def init(args: Any) -> None:
    """--custom-megatron-init-path"""
    from tests.helpers.megatron_cpu import megatron_on_cpu

    _until_the_end.enter_context(megatron_on_cpu())


def before_log_prob(args: Any, model: list[Any], store_prefix: str) -> None:
    """--custom-megatron-before-log-prob-hook-path"""
    _note(args, {"prefix": store_prefix, "stages": len(model)})


def before_train_step(
    args: Any, rollout_id: int, step_id: int, model: list[Any], optimizer: Any, opt_param_scheduler: Any
) -> None:
    """--custom-megatron-before-train-step-hook-path"""
    _note(args, {"rollout_id": rollout_id, "step_id": step_id, "groups": len(optimizer.param_groups)})


def _note(args: Any, what: dict[str, Any]) -> None:
    with (Path(args.run_dir) / "hooks.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")
