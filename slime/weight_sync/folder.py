"""Where the disk transport keeps versions of the weights. Known before anything starts: needs neither torch nor Ray."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MEMORY_FILE_SYSTEM = Path("/dev/shm")
NUM_VERSIONS = 2  # the one that engines hold, and the next one
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def weights_root(named: str | None, run_dir: Path, *, num_bytes: int) -> Path:
    """The folder `named` by the user, else memory if it has room for two versions of `num_bytes`, else `run_dir`.

    Never memory in a cluster that was joined (RAY_ADDRESS): it may have several nodes, and engines on each of them.
    """
    if named is not None:
        return Path(named)
    is_usable = MEMORY_FILE_SYSTEM.is_dir() and os.access(MEMORY_FILE_SYSTEM, os.W_OK)
    has_room = is_usable and free_bytes(MEMORY_FILE_SYSTEM) >= NUM_VERSIONS * num_bytes
    return MEMORY_FILE_SYSTEM if has_room and "RAY_ADDRESS" not in os.environ else run_dir


def checkpoint_bytes(directory: str) -> int:
    """Size of the weights in a Hugging Face directory."""
    found = (sorted(Path(directory).glob(pattern)) for pattern in _WEIGHTS)
    return sum(path.stat().st_size for path in next(filter(None, found), []))


def free_bytes(folder: Path) -> int:
    """What is free on the file system of a folder that may not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
