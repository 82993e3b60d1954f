"""Which checkpoint of the critic goes with that of the actor."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from slime.backends.shared.checkpoint import META, CheckpointError, iteration_folder
from slime.config.run import RunConfig, critic_settings

logger = logging.getLogger(__name__)

RunT = TypeVar("RunT", bound=RunConfig)


def critic_beside(run: RunT, actor: Path | None) -> RunT:
    """The settings of the critic that goes with the actor of `run`, which starts from the checkpoint `actor`, if any.

    Where the actor goes on from its checkpoint, so does the critic, from that of the same rollout. Raises
    CheckpointError where --resume finds none.
    """
    critic = critic_settings(run)
    step = None if actor is None or run.finetune else _rollout_of(actor)
    if step is None:
        return critic
    if critic.load is not None and _rollout_of(iteration_folder(critic.load, step)) is not None:
        return replace(critic, ckpt_step=step)
    if run.resume:
        raise CheckpointError(
            f"the actor continues from {actor}, but {critic.load} holds no critic of that rollout. Use --ckpt-step for "
            "one that both have, or start with --load and --critic-load instead of --resume."
        )
    logger.warning("the actor continues from %s, the critic does not: --critic-load has none of that rollout", actor)
    return critic


def _rollout_of(folder: Path) -> int | None:
    """The rollout after which the checkpoint was written; None where there is none of slime's."""
    path = folder / META
    return int(json.loads(path.read_text())["rollout_id"]) if path.is_file() else None
