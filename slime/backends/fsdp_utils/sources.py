"""Where the weights of each model of a run lie."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple, TypeVar

from transformers import AutoConfig, AutoTokenizer

from slime.backends.fsdp_utils.checkpoint import find_checkpoint
from slime.backends.shared.checkpoint import CheckpointError
from slime.backends.shared.critic import critic_beside
from slime.config.run import RunConfig

logger = logging.getLogger(__name__)

RunT = TypeVar("RunT", bound=RunConfig)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Source(NamedTuple):
    """directory: a Hugging Face directory: the shape, and weights. checkpoint: of this backend, with other weights.

    is_continued: the run goes on where that checkpoint was written, with optimizer, random numbers and rollout id.
    """

    directory: str
    checkpoint: Path | None = None
    is_continued: bool = False


def actor_source(run: RunConfig) -> Source:
    """--load; without anything in it --ref-load, else --hf-checkpoint."""
    own = find_checkpoint(run.load, run.ckpt_step)
    reference = reference_source(run)
    if run.load is not None and is_hf_directory(run.load):
        return Source(run.load, own, is_continued=own is not None and not run.finetune)
    if own is not None:
        return Source(reference.directory, own, is_continued=not run.finetune)
    if run.load is not None:
        start = reference.checkpoint or reference.directory
        logger.info("--load %s holds no checkpoint: starting from %s", run.load, start)
    return reference


def critic_source(run: RunConfig) -> Source:
    """run: `critic_run`. What it loads; without anything in it --critic-load, else --hf-checkpoint."""
    own = find_checkpoint(run.load, run.ckpt_step)
    if own is not None:
        return Source(run.hf_checkpoint, own, is_continued=not run.finetune)
    return _model_of("--critic-load", run.critic_load, None, otherwise=run.hf_checkpoint)


def reference_source(run: RunConfig) -> Source:
    """--ref-load, else --hf-checkpoint."""
    return _model_of("--ref-load", run.ref_load, run.ref_ckpt_step, otherwise=run.hf_checkpoint)


def teacher_source(run: RunConfig) -> Source:
    """--opd-teacher-load."""
    return _model_of("--opd-teacher-load", run.opd_teacher_load, run.opd_teacher_ckpt_step, otherwise=run.hf_checkpoint)


def _model_of(flag: str, place: str | None, step: int | None, *, otherwise: str) -> Source:
    """`place`, where it names a directory or a checkpoint; raises CheckpointError where it names neither."""
    if place is None:
        return Source(otherwise)
    if is_hf_directory(place):
        return Source(place)
    found = find_checkpoint(place, step)
    if found is None:
        raise CheckpointError(f"{flag} {place} holds neither a model nor a checkpoint")
    return Source(otherwise, found)


def critic_run(run: RunT) -> RunT:
    """The settings of the critic that goes with the actor of `run`: `critic_beside`."""
    return critic_beside(run, find_checkpoint(run.load, run.ckpt_step))


def is_hf_directory(path: str) -> bool:
    """Whether a Hugging Face model lies there."""
    return (Path(path) / "config.json").is_file()


def check_same_tokens(student: str, teacher: str, *, trust_remote_code: bool) -> None:
    """Raise ValueError where two Hugging Face directories do not mean the same by a token.

    Their tokenizers are compared, since models of one family pad their embeddings to different sizes; where one has no
    tokenizer, the sizes are.
    """
    if not all(_has_tokenizer(directory) for directory in (student, teacher)):
        sizes = [_vocab_size(directory, trust_remote_code) for directory in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(_differ(student, teacher, sizes))
        return
    vocabularies: list[dict[str, int]] = [
        AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code).get_vocab()
        for directory in (student, teacher)
    ]
    if len(vocabularies[0]) != len(vocabularies[1]):
        raise ValueError(_differ(student, teacher, [len(vocabulary) for vocabulary in vocabularies]))
    if different := vocabularies[0].items() - vocabularies[1].items():
        token, number = min(different, key=lambda entry: entry[1])
        raise ValueError(
            f"the teacher must have the student's tokenizer: token {number} is {token!r} in {student}, not in {teacher}"
        )


def _differ(student: str, teacher: str, sizes: list[int]) -> str:
    return (
        f"the teacher must have the student's vocabulary: {student} has {sizes[0]} tokens, the teacher {teacher} "
        f"{sizes[1]}"
    )


def _has_tokenizer(directory: str) -> bool:
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def _vocab_size(directory: str, trust_remote_code: bool) -> int:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    return int(config.get_text_config().vocab_size)
