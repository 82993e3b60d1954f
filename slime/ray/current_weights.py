"""The weights that engines hold, and a directory to start another one from: written at the latest when one needs it."""

from __future__ import annotations

import asyncio


class CurrentWeights:
    """One version at a time. Some transports write it to files as they send it, others only on demand."""

    def __init__(self) -> None:
        self.version: int | None = None
        self._directory: str | None = None
        self._wanted = asyncio.Event()
        self._written = asyncio.Event()

    def set(self, version: int, directory: str | None) -> None:
        """Engines hold `version` from now on. directory: where it lies, if anywhere."""
        self.version, self._directory = version, directory
        self._tell_those_who_wait()

    async def directory(self, *, timeout_s: float) -> str:
        """Where the version lies. Raises TimeoutError where nobody writes it in time."""
        async with asyncio.timeout(timeout_s):
            while self._directory is None:
                self._wanted.set()
                await self._written.wait()
        return self._directory

    async def wanted(self) -> int:
        """The version that is to be written; returns when one is."""
        await self._wanted.wait()
        assert self.version is not None
        return self.version

    def written(self, version: int, directory: str) -> None:
        """`version` lies in `directory`."""
        if version == self.version:
            self._directory = directory
        self._tell_those_who_wait()

    def _tell_those_who_wait(self) -> None:
        self._wanted.clear()
        self._written.set()
        self._written = asyncio.Event()
