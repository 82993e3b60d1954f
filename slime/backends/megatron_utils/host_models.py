"""Reference, old actor and teacher: weights in host memory that take the actor's place while they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slime.backends.megatron_utils.model import Chunk, Weights, copy_into, host_copy
from slime.backends.megatron_utils.sources import Source
from slime.training.backend import ModelTag


class HostModels:
    """Beside the model of `chunk`. moved: those that are not what was loaded: a checkpoint holds them too."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.weights: dict[ModelTag, Weights] = {}
        self.moved: set[ModelTag] = set()

    def load(self, wanted: dict[ModelTag, Source], read: Callable[[Source], None]) -> None:
        """read: overwrites the chunk's weights, which are back when this returns."""
        own = host_copy(self.chunk) if wanted else {}
        for tag, source in wanted.items():
            read(source)
            self.weights[tag] = host_copy(self.chunk)
        if wanted:
            copy_into(self.chunk, own)

    def copy(self, source: ModelTag, target: ModelTag) -> None:
        """Make `target` what `source` is now."""
        self.weights[target] = host_copy(self.chunk) if source == "actor" else dict(self.weights[source])
        self.moved.add(target)

    @contextmanager
    def in_place(self, tag: ModelTag) -> Iterator[None]:
        """The chunk with the weights of `tag`, then with its own again."""
        if tag in ("actor", "critic"):
            yield
            return
        own = host_copy(self.chunk)
        copy_into(self.chunk, self.weights[tag])
        yield
        copy_into(self.chunk, own)
