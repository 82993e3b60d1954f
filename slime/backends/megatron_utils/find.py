"""Which Megatron there is; found without importing it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from slime.config.base import ConfigError

PATH_VARIABLE = "MEGATRON_PATH"


class Megatron(NamedTuple):
    """folder: what holds `megatron/core`. has_training: a Megatron-LM checkout, not the package of PyPI alone."""

    folder: Path
    version: str
    has_training: bool
    has_transformer_engine: bool

    def __str__(self) -> str:
        parser = "with megatron.training" if self.has_training else "without megatron.training"
        kernels = "with" if self.has_transformer_engine else "without"
        return f"Megatron-core {self.version} in {self.folder}, {parser}, {kernels} Transformer Engine"


def find_megatron() -> Megatron:
    """The Megatron that this Python imports; that of $MEGATRON_PATH, whatever others there are.

    Raises ConfigError where there is none.
    """
    path = os.environ.get(PATH_VARIABLE)
    if path is not None and path not in sys.path:
        if not (Path(path) / "megatron" / "core").is_dir():
            raise ConfigError(f"{PATH_VARIABLE}={path} holds no megatron/core: it must be a checkout of Megatron-LM.")
        # Before others, but behind the user's modules: a checkout has `tests` and `tools` too.
        others = (number for number, folder in enumerate(sys.path) if (Path(folder) / "megatron").is_dir())
        sys.path.insert(next(others, len(sys.path)), path)
    folder = _folder_of("megatron.core")
    if folder is None:
        raise ConfigError(
            f"--train-backend megatron: {sys.executable} finds no Megatron. Put a checkout of Megatron-LM on "
            f"PYTHONPATH (or in {PATH_VARIABLE}), pip install megatron-core, or use --train-backend fsdp."
        )
    return Megatron(
        folder=folder.parent.parent,
        version=_version(folder / "package_info.py"),
        has_training=_folder_of("megatron.training") is not None,
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )


def has_training() -> bool:
    """Whether what is found, if anything, brings the parser of Megatron-LM."""
    try:
        return find_megatron().has_training
    except ConfigError:
        return False


def _folder_of(package: str) -> Path | None:
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of its parent
        return None
    return None if found is None or found.origin is None else Path(found.origin).parent


def _version(package_info: Path) -> str:
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", package_info.read_text(), re.MULTILINE))
    return ".".join(parts.get(name, "?") for name in ("MAJOR", "MINOR", "PATCH"))
