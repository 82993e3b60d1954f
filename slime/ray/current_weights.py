"""The weights that engines hold, and a directory to start another one from: written at the latest when one needs it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class WeightFiles(NamedTuple):
    """A version and the directory that holds it."""

    version: int
    directory: str


class CurrentWeights:
    """One version at a time. Some transports write it to files as they send it, others only on demand."""

    def __init__(self) -> None:
        self.version: int | None = None
        self._files: WeightFiles | None = None
        self._wanted = asyncio.Event()
        self._written = asyncio.Event()

    def set(self, version: int, directory: str | None) -> None:
        """Engines hold `version` from now on. directory: where it lies, if anywhere."""
        self.version = version
        self._files = None if directory is None else WeightFiles(version, directory)
        self._tell_those_who_wait()

    async def files(self, *, timeout_s: float) -> WeightFiles:
        """Where the version lies, or the next one. Raises TimeoutError where nobody writes it in time."""
        async with asyncio.timeout(timeout_s):
            while self._files is None:
                self._wanted.set()
                await self._written.wait()
        return self._files

    async def wanted(self) -> int:
        """The version that is to be written; returns when one is."""
        await self._wanted.wait()
        self._wanted.clear()  # or whoever asks again before these are written has them written twice
        assert self.version is not None
        return self.version

    def written(self, version: int, files: WeightFiles) -> None:
        """`version` was wanted and lies in `files`; a later one, where trainers had trained meanwhile."""
        if version == self.version:
            self._files = files
        self._tell_those_who_wait()

    def _tell_those_who_wait(self) -> None:
        self._wanted.clear()
        self._written.set()
        self._written = asyncio.Event()
