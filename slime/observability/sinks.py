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
        _require("tensorboard", "--use-tensorboard", "tensorboard")
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def log(self, axis: Axis, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run, each metric against the step of its own axis.

    use_train_step: plot everything against `train/step`; a metric of another axis then stands at the last train step.
    settings: keyword arguments of `wandb.init`, among them `id`.
    """

    name = "wandb"

    def __init__(self, settings: Mapping[str, Any], *, use_train_step: bool) -> None:
        import wandb

        self.failures: tuple[type[Exception], ...] = (wandb.Error, OSError, RuntimeError)
        self._use_train_step = use_train_step
        self._train_step = 0
        self._run = wandb.init(**settings, resume="allow", reinit="create_new")
        for axis in AXES:
            self._run.define_metric(axis)
        for pattern, axis in (("rollout/*", AXES[0]), ("perf/*", AXES[0]), ("train/*", AXES[1]), ("eval/*", AXES[2])):
            self._run.define_metric(pattern, step_metric="train/step" if use_train_step else axis)

    def log(self, axis: Axis, step: int, metrics: Mapping[str, float]) -> None:
        if axis == "train/step":
            self._train_step = step
        steps: dict[str, float] = {axis: step}
        if self._use_train_step:
            steps["train/step"] = self._train_step
        self._run.log({**metrics, **steps})

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: TrackingConfig, run_dir: Path, arguments: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the configuration asks for. `arguments` are recorded with the run.

    Raises ValueError where a package is missing or a key is refused; a server out of reach costs a warning only.
    """
    sinks: list[Sink] = []
    if config.use_tensorboard:
        folder = Path(config.tb_project_name) if config.tb_project_name else run_dir / "tensorboard"
        sinks.append(TensorBoardSink(folder / config.tb_experiment_name if config.tb_experiment_name else folder))
    if config.use_wandb:
        sink = _open_wandb(config, run_dir, arguments)
        sinks += [sink] if sink is not None else []
    return sinks


def _open_wandb(config: TrackingConfig, run_dir: Path, arguments: Mapping[str, Any]) -> WandbSink | None:
    _require("wandb", "--use-wandb", "slime[wandb]")
    import wandb

    try:
        if config.wandb_key is not None and config.wandb_mode not in ("offline", "disabled"):
            wandb.login(key=config.wandb_key, host=config.wandb_host)
        return WandbSink(_wandb_settings(config, run_dir, arguments), use_train_step=config.wandb_always_use_train_step)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ValueError(f"--use-wandb: {error}") from error
    except (wandb.Error, OSError) as error:
        logger.warning("wandb is out of reach, the run goes on without it: %s", error)
        return None


def _wandb_settings(config: TrackingConfig, run_dir: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    run_id = _wandb_run_id(run_dir, config.wandb_run_id)
    group = config.wandb_group
    if group is not None and config.wandb_random_suffix:
        group = f"{group}_{run_id}"  # random, and the same when the run is resumed
    settings = {
        "id": run_id,
        "mode": config.wandb_mode,
        "dir": config.wandb_dir or str(run_dir),
        "entity": config.wandb_team,
        "project": config.wandb_project,
        "group": group,
        "name": group,
        "config": dict(arguments),
        "settings": {"base_url": config.wandb_host} if config.wandb_host is not None else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _wandb_run_id(run_dir: Path, wanted: str | None) -> str:
    """The wanted id, else the one that this run directory already has, else a new one; kept in the directory."""
    path = run_dir / WANDB_RUN_ID_FILE
    run_id = wanted or (path.read_text().strip() if path.exists() else "") or secrets.token_hex(4)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run_id + "\n")
    return run_id


def _require(module: str, flag: str, requirement: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"{flag} needs the {module} package, which is not installed. "
            f"Run `pip install {requirement!r}` or leave the flag out."
        )
