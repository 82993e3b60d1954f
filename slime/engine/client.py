"""The trainer's and the fleet's view of one engine on the wire: life signs, weights, memory. Any engine will do."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from slime.utils.http_utils import HTTPError, get, post

IDLE_DEADLINE_S = 30.0  # for the last requests to leave an engine that gets no new ones
IDLE_POLL_S = 0.05
CHECKSUM_S = 600.0  # for checksums of all weights, which large models take long for


class EngineError(RuntimeError):
    """The engine answered, and the answer was that it did not work."""


class UpdateGroupAddress(NamedTuple):
    """Where the members of a process group meet, and how many they are. backend: nccl or gloo."""

    name: str
    host: str
    port: int
    world_size: int
    backend: str


class TensorShape(NamedTuple):
    """A tensor without its data. dtype: such as "bfloat16"."""

    name: str
    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class EngineClient:
    """One engine. url: `http://host:port`. Every call has its deadline and raises HTTPError or EngineError.

    is_sglang: it ends itself where its cache is flushed, as with every update, or its memory released, while it has
    requests, waiting ones included. So they are ended first.
    """

    url: str
    api_key: str | None = None
    timeout_s: float = 60.0
    is_sglang: bool = False

    async def is_healthy(self, *, timeout_s: float) -> bool:
        """Whether /health answers in time."""
        try:
            await get(f"{self.url}/health", timeout_s=timeout_s, headers=self._headers())
        except HTTPError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """`model_path`, `weight_version` and more."""
        info: dict[str, Any] = await get(f"{self.url}/model_info", timeout_s=self.timeout_s, headers=self._headers())
        return info

    async def pause(self) -> None:
        """Stop generating and take no requests up. What is in flight gives up its cache and waits.

        SGLang's answers with what it has, as aborted, and whoever asked asks for the rest: within about a second.
        """
        await self._call("pause_generation", {"mode": "abort" if self.is_sglang else "retract"})

    async def resume(self) -> None:
        """Go on generating."""
        await self._call("continue_generation", {})

    async def flush_cache(self) -> None:
        """Forget every cached prefix, once no request is left. Raises HTTPError where one stays."""
        deadline = time.monotonic() + IDLE_DEADLINE_S
        while True:
            try:
                await self._call("flush_cache", {})
                return
            except HTTPError as error:
                if error.status != 400 or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(IDLE_POLL_S)

    async def abort_all(self) -> None:
        """End every request; each answers with what it has."""
        await self._call("abort_request", {"abort_all": True})

    async def update_weights_from_disk(self, directory: str, *, version: int, timeout_s: float) -> None:
        """Take the weights of a Hugging Face directory, in place, and forget all cached prefixes."""
        payload = {"model_path": directory, "weight_version": str(version), "flush_cache": True}
        await self._call("update_weights_from_disk", payload, timeout_s=timeout_s)

    async def update_weights_from_tensor(self, payloads: list[str], *, version: int | None, timeout_s: float) -> None:
        """Take one bucket of tensors, given as a pickle for each part of the engine; version: with the last bucket.

        The last one also forgets all cached prefixes.
        """
        payload = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket"}
        end = {"flush_cache": version is not None} | ({} if version is None else {"weight_version": str(version)})
        await self._call("update_weights_from_tensor", payload | end, timeout_s=timeout_s)

    async def server_info(self) -> dict[str, Any]:
        """Its settings, among them `tp_size`, and `startup_time`, which no two starts share."""
        info: dict[str, Any] = await get(f"{self.url}/server_info", timeout_s=self.timeout_s, headers=self._headers())
        return info

    async def join_update_group(self, group: UpdateGroupAddress, *, rank: int, timeout_s: float) -> None:
        """Join a process group with trainers as `rank` and, for an engine of several parts, the ranks after it."""
        payload = {
            "master_address": group.host,
            "master_port": group.port,
            "rank_offset": rank,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
        }
        await self._call("init_weights_update_group", payload, timeout_s=timeout_s, retry_for_s=0.0)

    async def update_weights_from_distributed(
        self, group_name: str, tensors: list[TensorShape], *, version: int | None, timeout_s: float
    ) -> None:
        """Take one bucket that rank 0 of a group broadcasts, the tensors end to end; version: with the last bucket.

        The last one also forgets all cached prefixes. Never repeated: the engine would wait for a second broadcast.
        """
        payload = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "group_name": group_name,
            "load_format": "flattened_bucket",
        }
        end = {"flush_cache": version is not None} | ({} if version is None else {"weight_version": str(version)})
        await self._call("update_weights_from_distributed", payload | end, timeout_s=timeout_s, retry_for_s=0.0)

    async def leave_update_group(self, group_name: str, *, timeout_s: float) -> None:
        """Leave a process group, also in the middle of a broadcast."""
        payload = {"group_name": group_name}
        await self._call("destroy_weights_update_group", payload, timeout_s=timeout_s, retry_for_s=0.0)

    async def release_memory(self, tags: list[str]) -> None:
        """Give up the memory of "weights" and, or, "kv_cache"."""
        if self.is_sglang:
            await self.flush_cache()
        await self._call("release_memory_occupation", {"tags": tags})

    async def resume_memory(self, tags: list[str]) -> None:
        """Take it back; weights are undefined until the next update."""
        await self._call("resume_memory_occupation", {"tags": tags})

    async def shard_checksums(self) -> dict[str, str]:
        """SGLang's: its own checksum of every tensor of every rank, under its own names."""
        answer = await self._call("weights_checker", {"action": "checksum"}, timeout_s=CHECKSUM_S)
        ranks: list[dict[str, Any]] = answer["ranks"]
        return {
            f"{name} of rank {i}": digest for i, rank in enumerate(ranks) for name, digest in rank["checksums"].items()
        }

    async def scramble_weights(self) -> None:
        """SGLang's: noise instead of weights."""
        await self._call("weights_checker", {"action": "reset_tensors"}, timeout_s=CHECKSUM_S)

    async def checksums(self) -> dict[str, str]:
        """Checksum of every tensor by its Hugging Face name (`slime.utils.checksum`); the embedded engine's."""
        answer = await self._call("weights_checker", {"action": "checksum"})
        checksums: dict[str, str] = answer["checksums"]
        return checksums

    async def _call(
        self, path: str, payload: dict[str, Any], *, timeout_s: float | None = None, retry_for_s: float = 5.0
    ) -> Any:
        url = f"{self.url}/{path}"
        answer = await post(
            url, payload, timeout_s=timeout_s or self.timeout_s, retry_for_s=retry_for_s, headers=self._headers()
        )
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{url}: {answer.get('message', answer)}")
        return answer

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
