"""From an HF directory to a `torch_dist` checkpoint that any parallel layout of Megatron loads."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from slime.backends.megatron_utils.convert.torch_dist_file import Chunk, write
from slime.backends.megatron_utils.convert.torch_dist_keys import extra_states, slots
from slime.backends.megatron_utils.model_arguments import Given
from slime.backends.megatron_utils.names import (
    HFDirectory,
    Mapped,
    ModelShape,
    NameMapError,
    all_parameters,
    check_checkpoint,
    local_tensor,
    passed_through,
    read_shape,
)
from slime.utils.files import fsync_tree, replace_directory, write_text_atomically

logger = logging.getLogger(__name__)
TRACKER = "latest_checkpointed_iteration.txt"


def hf_to_torch_dist(
    source: Path, target: Path, given: Given | None = None, *, progress: Callable[[str], None] = lambda name: None
) -> None:
    """Write `target`/release and the tracker that names it; complete or absent.

    given: model arguments of the Megatron that will load it, if they are not to be derived from config.json.
    progress: is told each parameter's name before it is written.
    Raises NameMapError, naming the tensor, where the checkpoint is not what its config.json says; OSError where the
    disk has not enough room or `target` holds a checkpoint already.
    """
    given = given or Given()
    shape = read_shape(source)
    given.check(shape)
    checkpoint = HFDirectory(source)
    check_checkpoint(shape, checkpoint.shapes)
    _check_tied_copy(shape, checkpoint)
    if (target / TRACKER).exists():
        raise FileExistsError(f"{target} holds a checkpoint already; nothing was written")
    chunks = list(_chunks(shape, checkpoint, given, progress))
    target.mkdir(parents=True, exist_ok=True)
    _check_room(target, sum(chunk.num_bytes for chunk in chunks))
    temporary = target / ".release.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        states = extra_states(shape, all_parameters(shape), stacked=given.stacks_layers(shape))
        write(chunks, states, temporary)
        fsync_tree(temporary)
        replace_directory(temporary, target / "release")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_text_atomically(target / TRACKER, "release")
    if left := passed_through(shape, checkpoint.shapes):
        logger.info("%d tensors are not Megatron's and stay in %s: %s, ...", len(left), source, left[0])


def _chunks(
    shape: ModelShape, checkpoint: HFDirectory, given: Given, progress: Callable[[str], None]
) -> Iterator[Chunk]:
    divisor, stacked = given.vocabulary_divisor, given.stacks_layers(shape)
    padded_vocab_size = -(-shape.vocab_size // divisor) * divisor
    for parameter in all_parameters(shape, padded_vocab_size=padded_vocab_size):
        own = parameter.local_shape(0)
        for slot in slots(shape, parameter, stacked=stacked):
            yield Chunk(
                key=slot.key,
                full_shape=slot.lengths + own,
                offset=slot.position + (0,) * len(own),
                shape=(1,) * len(slot.position) + own,
                dtype=_dtype(parameter, checkpoint),
                make=partial(_make, parameter, checkpoint, progress),
            )


def _make(parameter: Mapped, checkpoint: HFDirectory, progress: Callable[[str], None]) -> Tensor:
    progress(parameter.name)
    return local_tensor(parameter, checkpoint.read)


def _dtype(parameter: Mapped, checkpoint: HFDirectory) -> torch.dtype:
    dtypes = {name: checkpoint.dtypes[name] for name, _ in parameter.hf}
    if len(set(dtypes.values())) > 1:
        raise NameMapError(f"{parameter.name} is made of tensors of several dtypes: {dtypes}")
    return next(iter(dtypes.values()))


def _check_tied_copy(shape: ModelShape, checkpoint: HFDirectory) -> None:
    if not shape.tied or "lm_head.weight" not in checkpoint.shapes:
        return
    if not torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight")):
        raise NameMapError(
            "config.json: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"
        )


def _check_room(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes * 1.01:
        raise OSError(f"{directory} has {free / 2**30:.1f} GiB free; {num_bytes / 2**30:.1f} GiB are needed")
