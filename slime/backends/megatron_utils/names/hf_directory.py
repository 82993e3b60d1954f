"""The tensors of an HF directory, read in slices: a rank reads what it needs and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slime.backends.megatron_utils.names.model_shape import NameMapError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFDirectory:
    """safetensors files, opened once (mapped into memory, so that slices cost what they hold).

    Raises NameMapError where there are none, or where one cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self._files: dict[str, Any] = {}
        self._unread: dict[str, Path] = {}  # by the tensors in it: a file of which nothing was read yet
        for path in _paths(Path(directory)):
            try:
                file = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise NameMapError(f"{path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
            self._unread |= dict.fromkeys(file.keys(), path)
        slices = {name: file.get_slice(name) for name, file in self._files.items()}
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self.dtypes = {name: _dtype(name, part.get_dtype()) for name, part in slices.items()}

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` along `axis` of a tensor, in the dtype of the file."""
        self._announce(name)
        part = self._files[name].get_slice(name)
        index = (slice(None),) * axis + (slice(start, stop),)
        return part[index]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        self._announce(name)
        return self._files[name].get_tensor(name)

    def _announce(self, name: str) -> None:
        """Have the kernel read a file ahead once something of it is wanted: page by page it takes twice as long."""
        path = self._unread.get(name)
        if path is None:
            return
        self._unread = {other: place for other, place in self._unread.items() if place != path}
        if hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(descriptor)


def _paths(directory: Path) -> list[Path]:
    """Those of the index, where there is one: other files may hold the same weights under other names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if paths := sorted(directory.glob("*.safetensors")):
        return paths
    raise NameMapError(f"{directory} holds no *.safetensors")


def _dtype(name: str, code: str) -> torch.dtype:
    if code not in _DTYPES:
        raise NameMapError(f"tensor {name} is stored as {code}; {', '.join(_DTYPES)} can be read. Dequantize it first.")
    return _DTYPES[code]
