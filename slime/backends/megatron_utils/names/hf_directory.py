"""The tensors of an HF directory, read in slices: a rank reads what it needs and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.backends.megatron_utils.names.model_shape import NameMapError


class HFDirectory:
    """safetensors files, opened once (mapped into memory, so that slices cost what they hold).

    Raises NameMapError where there are none, or where one cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        paths = sorted(Path(directory).glob("*.safetensors"))
        if not paths:
            raise NameMapError(f"{directory} holds no *.safetensors")
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise NameMapError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` along `axis` of a tensor, in the dtype of the file."""
        part = self._files[name].get_slice(name)
        index = (slice(None),) * axis + (slice(start, stop),)
        return part[index]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._files[name].get_tensor(name)
