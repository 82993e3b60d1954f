"""Where the weights of each model of a run lie."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from slime.backends.megatron_utils.folders import CheckpointError, find_checkpoint
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)


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
