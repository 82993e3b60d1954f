"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases. Neither is imported before it is used."""

from __future__ import annotations

import importlib.util
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

Axis = Literal["rollout/step", "train/step", "eval/step"]
AXES: tuple[Axis, ...] = ("rollout/step", "train/step", "eval/step")
WANDB_RUN_ID_FILE = "wandb_run_id.txt"
logger = logging.getLogger(__name__)


class TrackingConfig(Protocol):
    """What the sinks need of `slime.config.observe.ObserveConfig`."""

    @property
    def use_tensorboard(self) -> bool: ...
    @property
    def tb_project_name(self) -> str | None: ...
    @property
    def tb_experiment_name(self) -> str | None: ...
    @property
    def use_wandb(self) -> bool: ...
    @property
    def wandb_mode(self) -> Literal["online", "offline", "disabled"] | None: ...
    @property
    def wandb_dir(self) -> str | None: ...
    @property
    def wandb_key(self) -> str | None: ...
    @property
    def wandb_host(self) -> str | None: ...
    @property
    def wandb_team(self) -> str | None: ...
    @property
    def wandb_group(self) -> str | None: ...
    @property
    def wandb_project(self) -> str | None: ...
    @property
    def wandb_run_id(self) -> str | None: ...
    @property
    def wandb_random_suffix(self) -> bool: ...
    @property
    def wandb_always_use_train_step(self) -> bool: ...


class Sink(Protocol):
    """One destination. `failures` are the exceptions that mean "the destination is out of order", not a bug of ours."""

    name: str
    failures: tuple[type[Exception], ...]

    def log(self, axis: Axis, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoardSink:
    """Scalars into an event folder; each tag against the step of its own axis."""

    name = "tensorboard"
    failures: tuple[type[Exception], ...] = (OSError, RuntimeError)

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer
        from tensorboard.summary._output import DirectoryOutput  # noqa: F401
