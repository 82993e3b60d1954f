"""The endpoints for weights and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from slime.engine.embedded.engine import Engine, EngineUnavailable
from slime.engine.embedded.generation import Handler, json_response
from slime.engine.embedded.protocol import BadRequest, parse_json
from slime.engine.embedded.weight_transport import NamedTensors, UpdateGroups, unpack_tensors
from slime.engine.embedded.weights import WeightsRefused

MEMORY_TAGS = {"weights", "kv_cache"}


class WeightRoutes:
    """The handlers. A refused update answers 400 with `success` false and leaves the weights as they were."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups = UpdateGroups(engine.runner.device)

    def routes(self) -> dict[str, Handler]:
        """Each handler under its path."""
        return {
            "/update_weights_from_disk": self.from_disk,
            "/update_weights_from_tensor": self.from_tensor,
            "/init_weights_update_group": self.join_group,
            "/update_weights_from_distributed": self.from_distributed,
            "/destroy_weights_update_group": self.leave_group,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
            "/get_weights_by_name": self.get_by_name,
            "/weights_checker": self.check,
        }

    async def from_disk(self, http: HTTPRequest) -> Response:
        """Replaces all weights by a checkpoint's."""
        body = parse_json(await http.body())
        path = _field(body, "model_path", str)
        if body.get("load_format") not in (None, "auto", "safetensors"):
            raise BadRequest(f"load_format must be auto or safetensors, got {body['load_format']!r}.")
        return await self._update(body, lambda: self._engine.weights.load_from_disk(path))

    async def from_tensor(self, http: HTTPRequest) -> Response:
        """Replaces the tensors that the request holds; several requests may make a whole update."""
        body = parse_json(await http.body())
        payloads = _field(body, "serialized_named_tensors", list)
        if len(payloads) != 1 or not isinstance(payloads[0], str):
            raise BadRequest("serialized_named_tensors must be a list of one base64 string: the engine has one rank.")
        load_format = body.get("load_format")
        return await self._update(body, lambda: self._load(unpack_tensors(payloads[0], load_format)))

    async def join_group(self, http: HTTPRequest) -> Response:
        """Joins a process group with trainers; answers once all its members have joined."""
        body = parse_json(await http.body())
        address = f"tcp://{_field(body, 'master_address', str)}:{_field(body, 'master_port', int)}"
        rank, world_size = _field(body, "rank_offset", int), _field(body, "world_size", int)
        name, backend = body.get("group_name", "weight_update_group"), body.get("backend", "nccl")
        if backend == "nccl" and self._engine.runner.device.type == "cpu":
            raise BadRequest("backend nccl needs a GPU; this engine runs on a CPU: use gloo.")
        return await _outcome(
            asyncio.to_thread(
                self._groups.join, name, address=address, rank=rank, world_size=world_size, backend=backend
            ),
            "Succeeded to initialize custom process group.",
        )

    async def from_distributed(self, http: HTTPRequest) -> Response:
        """Replaces the tensors that rank 0 of a group broadcasts."""
        body = parse_json(await http.body())
        names, dtypes, shapes = (_field(body, key, list) for key in ("names", "dtypes", "shapes"))
        if not len(names) == len(dtypes) == len(shapes):
            raise BadRequest(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes do not fit together.")
        group = body.get("group_name", "weight_update_group")
        flattened = body.get("load_format") == "flattened_bucket"
        return await self._update(
            body, lambda: self._load(self._groups.receive(group, names, dtypes, shapes, flattened=flattened))
        )

    async def leave_group(self, http: HTTPRequest) -> Response:
        """Leaves a process group, and with it what the engine's thread may wait for."""
        name = parse_json(await http.body()).get("group_name", "weight_update_group")
        return await _outcome(asyncio.to_thread(self._groups.leave, name), "Succeeded to destroy custom process group.")

    async def release_memory(self, http: HTTPRequest) -> Response:
        """Frees weights, cache, or both."""
        return await self._change_memory(http, self._engine.release_memory)

    async def resume_memory(self, http: HTTPRequest) -> Response:
        """Takes the memory of weights, cache, or both again."""
        return await self._change_memory(http, self._engine.resume_memory)

    async def get_by_name(self, http: HTTPRequest) -> Response:
        """The first elements of a tensor."""
        body = parse_json(await http.body())
        name, size = _field(body, "name", str), body.get("truncate_size", 100)
        self._engine.check_available()
        try:
            values = await self._engine.run(lambda: self._engine.weights.tensor(name)[:size].float().tolist())
        except WeightsRefused as error:
            raise BadRequest(str(error)) from error
        return json_response(values)

    async def check(self, http: HTTPRequest) -> Response:
        """A checksum of every tensor, by its checkpoint name."""
        action = parse_json(await http.body()).get("action", "checksum")
        if action != "checksum":
            raise BadRequest(f"action must be checksum, got {action!r}.")
        reason = self._engine.weights.reason_unusable()
        if reason is not None:
            raise EngineUnavailable(reason)
        checksums = await self._engine.run(self._engine.weights.checksums)
        return json_response({"success": True, "message": "Success.", "checksums": checksums})

    def _load(self, tensors: NamedTensors) -> None:
        weights = self._engine.weights
        weights.check({name: tensor.shape for name, tensor in tensors}, origin="the update", complete=False)
        weights.load(tensors)

    async def _update(self, body: dict[str, Any], change: Callable[[], None]) -> Response:
        version, abort_all = body.get("weight_version"), bool(body.get("abort_all_requests"))
        if version is not None and not isinstance(version, str):
            raise BadRequest(f"weight_version must be a string, got {version!r}.")
        update = self._engine.update_weights
        return await _outcome(
            self._engine.run(lambda: update(change, version=version, abort_all=abort_all)),
            "Succeeded to update model weights.",
        )

    async def _change_memory(self, http: HTTPRequest, change: Callable[[set[str]], None]) -> Response:
        tags = set(parse_json(await http.body()).get("tags") or MEMORY_TAGS)
        if not tags <= MEMORY_TAGS:
            raise BadRequest(f"tags must be among {sorted(MEMORY_TAGS)}, got {sorted(tags - MEMORY_TAGS)}.")
        try:
            await self._engine.run(lambda: change(tags))
        except EngineUnavailable as error:
            raise BadRequest(str(error)) from error
        return json_response({"success": True})


async def _outcome(work: Any, message: str) -> Response:
    """Awaits `work` and answers that it succeeded, or why the weights were refused."""
    try:
        await work
    except WeightsRefused as error:
        return json_response({"success": False, "message": str(error)}, 400)
    return json_response({"success": True, "message": message})


def _field(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind):
        raise BadRequest(f"{name} is needed and must be {kind.__name__}, got {value!r:.80}.")
    return value
