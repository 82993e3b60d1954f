"""Where the weights of each model of a run lie."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple, TypeVar

from slime.backends.megatron_utils.folders import find_checkpoint, read_meta
from slime.backends.shared.checkpoint import CheckpointError
from slime.backends.shared.critic import critic_beside
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)

RunT = TypeVar("RunT", bound=RunConfig)


class Source(NamedTuple):
    """path: a Hugging Face directory, or a folder of one checkpoint. is_own: the actor's --load, not a fall-back."""

    path: Path
    is_checkpoint: bool
    is_own: bool = False


def actor_source(run: RunConfig) -> Source:
    """--load; without anything in it --ref-load, else --hf-checkpoint."""
    if run.load is not None:
        own = _found(run.load, run.ckpt_step)
        if own is not None:
            return own._replace(is_own=True)
        logger.info("--load %s holds no checkpoint: starting from --ref-load or --hf-checkpoint", run.load)
    return reference_source(run)


def critic_source(run: RunConfig) -> Source:
    """run: `critic_run`. What it loads; without anything in it --critic-load, else --hf-checkpoint."""
    own = None if run.load is None else _found(run.load, run.ckpt_step)
    source = _model_of("--critic-load", run.critic_load, None, run.hf_checkpoint) if own is None else own
    meta = read_meta(source.path) if source.is_checkpoint else None
    if source.is_checkpoint and (meta is None or meta.role != "critic"):
        raise CheckpointError(f"{source.path} is no critic: start one from a Hugging Face directory")
    return source._replace(is_own=own is not None)


def critic_run(run: RunT) -> RunT:
    """The settings of the critic that goes with the actor of `run`: `critic_beside`."""
    return critic_beside(run, find_checkpoint(run.load, run.ckpt_step))


def reference_source(run: RunConfig) -> Source:
    """--ref-load, else --hf-checkpoint."""
    return _model_of("--ref-load", run.ref_load, run.ref_ckpt_step, run.hf_checkpoint)


def teacher_source(run: RunConfig) -> Source:
    """--opd-teacher-load."""
    return _model_of("--opd-teacher-load", run.opd_teacher_load, run.opd_teacher_ckpt_step, run.hf_checkpoint)


def _model_of(flag: str, place: str | None, step: int | None, otherwise: str) -> Source:
    if place is None:
        return Source(Path(otherwise), is_checkpoint=False)
    found = _found(place, step)
    if found is None:
        raise CheckpointError(f"{flag} {place} holds neither a Hugging Face model nor a Megatron checkpoint")
    return found


def _found(place: str, step: int | None) -> Source | None:
    """A checkpoint there goes before a Hugging Face model there."""
    folder = find_checkpoint(place, step)
    if folder is not None:
        return Source(folder, is_checkpoint=True)
    return Source(Path(place), is_checkpoint=False) if (Path(place) / "config.json").is_file() else None
