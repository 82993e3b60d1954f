"""Everything but generation: health, information, pausing, cache, weights and memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.engine import Engine, EngineUnavailable, describe
from slime.engine.embedded.generation import Generator, Progress, error_body, json_response
from slime.engine.embedded.protocol import BadRequest, Generation, parse_json
from slime.engine.embedded.sampling_params import SamplingParams
from slime.engine.embedded.weights import WeightsRefused

Result = TypeVar("Result")
Handler = Callable[[HTTPRequest], Awaitable[Response]]

MEMORY_TAGS = {"weights", "kv_cache"}
HEALTH_TIMEOUT_S = 20.0


class Admin:
    """The handlers; each runs its work in the engine's thread, between two steps."""

    def __init__(self, engine: Engine, generator: Generator, args: ServerArgs) -> None:
        self._engine, self._generator, self._args = engine, generator, args
        self._started = time.time()

    def add_routes(self, app: FastAPI) -> None:
        """Adds all handlers to the application."""
        reads: dict[str, Handler] = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_server_info": self.server_info,
            "/get_load": self.get_load,
        }
        writes: dict[str, Handler] = {
            "/abort_request": self.abort_request,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/update_weights_from_disk": self.update_weights_from_disk,
        }
        both: dict[str, Handler] = {
            "/flush_cache": self.flush_cache,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
            "/get_weights_by_name": self.get_weights_by_name,
            "/weights_checker": self.weights_checker,
        }
        for methods, handlers in ((["GET"], reads), (["POST"], writes), (["GET", "POST"], both)):
            for path, handler in handlers.items():
                app.router.add_route(path, handler, methods=methods)

    # reads

    async def health(self, _: HTTPRequest) -> Response:
        """200 while the engine's thread answers."""
        return Response(status_code=200)

    async def health_generate(self, http: HTTPRequest) -> Response:
        """200 if a token can be generated now, or others are being generated."""
        if self._engine.scheduler.has_work:
            return Response(status_code=200)
        progress = Progress()
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        requests = self._generator.parser.make_requests([0], params, "HEALTH_CHECK", progress.notice)
        generation = Generation(requests, is_list=False, stream=False, text_in_logprobs=False)
        try:
            await asyncio.wait_for(self._generator.run(generation, progress, http), HEALTH_TIMEOUT_S)
        except TimeoutError:
            self._generator.abort(generation)
            return json_response(error_body(f"no token within {HEALTH_TIMEOUT_S:.0f} s"), 503)
        return Response(status_code=200)

    async def model_info(self, _: HTTPRequest) -> Response:
        """Which model this is, and its weight version."""
        config = self._engine.runner.model.config
        return json_response(
            {
                "model_path": self._args.model_path,
                "served_model_name": self._args.served_model_name or self._args.model_path,
                "tokenizer_path": self._args.tokenizer_path or self._args.model_path,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self._generator.weight_version,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": config.model_type,
                "architectures": config.architectures,
            }
        )

    async def server_info(self, _: HTTPRequest) -> Response:
        """The settings, what the engine is doing, and what it did."""
        args = asdict(self._args)
        has_key = args.pop("api_key") is not None
        runner = self._engine.runner
        return json_response(
            {
                **args,
                "engine": "slime-embedded",
                "requires_api_key": has_key,
                "device": str(runner.device),
                "dtype": str(runner.dtype).removeprefix("torch."),
                "context_length": runner.context_length,
                "max_total_num_tokens": runner.cache.num_tokens,
                "is_batch_invariant": runner.is_exact,
                "tp_size": 1,
                "dp_size": 1,
                "internal_states": [describe(self._engine)],
                "counters": asdict(self._engine.scheduler.counters),
                "startup_time": self._started,
            }
        )

    async def get_load(self, _: HTTPRequest) -> Response:
        """How busy the engine is, in the one-item list that SGLang answers."""
        state = describe(self._engine)
        load = {
            "dp_rank": 0,
            "num_reqs": state["num_running_reqs"] + state["num_waiting_reqs"],
            "num_waiting_reqs": state["num_waiting_reqs"],
            "num_tokens": state["num_used_tokens"],
            "ts_tic": time.perf_counter(),
        }
        return json_response([load])

    # generation

    async def abort_request(self, http: HTTPRequest) -> Response:
        """Ends a request, or all; they answer with what they have."""
        body = parse_json(await http.body())
        rid, abort_all = body.get("rid") or "", bool(body.get("abort_all"))
        if not rid and not abort_all:
            raise BadRequest("abort_request needs a rid, or abort_all.")
        await self._run(lambda: self._engine.abort(rid, all_requests=abort_all))
        return Response(status_code=200)

    async def pause_generation(self, http: HTTPRequest) -> Response:
        """Stops generation; new requests queue."""
        mode = parse_json(await http.body()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode must be abort, retract or in_place, got {mode!r}.")
        await self._run(lambda: self._engine.pause(mode))
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, _: HTTPRequest) -> Response:
        """Lets generation go on."""
        await self._run(self._engine.resume)
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, _: HTTPRequest) -> Response:
        """Forgets known prefixes."""
        if await self._run(self._engine.flush_cache):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Cache not flushed: requests are running or waiting.\n", status_code=400)

    # weights and memory

    async def update_weights_from_disk(self, http: HTTPRequest) -> Response:
        """Replaces all weights by a checkpoint's."""
        body = parse_json(await http.body())
        path = body.get("model_path")
        if not isinstance(path, str):
            raise BadRequest("update_weights_from_disk needs model_path, a folder.")
        if body.get("load_format") not in (None, "auto", "safetensors"):
            raise BadRequest(f"load_format must be auto or safetensors, got {body['load_format']!r}.")
        return await self._update(body, lambda: self._engine.weights.load_from_disk(path))

    async def release_memory(self, http: HTTPRequest) -> Response:
        """Frees weights, cache, or both."""
        return await self._change_memory(http, self._engine.release_memory)

    async def resume_memory(self, http: HTTPRequest) -> Response:
        """Takes the memory of weights, cache, or both again."""
        return await self._change_memory(http, self._engine.resume_memory)

    async def get_weights_by_name(self, http: HTTPRequest) -> Response:
        """The first elements of a tensor."""
        body = parse_json(await http.body()) or dict(http.query_params)
        name, size = body.get("name"), int(body.get("truncate_size", 100))
        if not isinstance(name, str):
            raise BadRequest("get_weights_by_name needs name.")
        try:
            values = await self._run(lambda: self._engine.weights.tensor(name)[:size].float().tolist())
        except WeightsRefused as error:
            raise BadRequest(str(error)) from error
        return json_response(values)

    async def weights_checker(self, http: HTTPRequest) -> Response:
        """A checksum of every tensor, by its checkpoint name."""
        action = parse_json(await http.body()).get("action", "checksum")
        if action != "checksum":
            raise BadRequest(f"action must be checksum, got {action!r}.")
        self._engine.check_available()
        checksums = await self._run(self._engine.weights.checksums)
        return json_response({"success": True, "message": "Success.", "checksums": checksums})

    async def _update(self, body: dict[str, Any], change: Callable[[], None]) -> Response:
        version, abort_all = body.get("weight_version"), bool(body.get("abort_all_requests"))
        if version is not None and not isinstance(version, str):
            raise BadRequest(f"weight_version must be a string, got {version!r}.")
        update = self._engine.update_weights
        try:
            await self._run(lambda: update(change, version=version, abort_all=abort_all))
        except WeightsRefused as error:
            return json_response({"success": False, "message": str(error)}, 400)
        return json_response({"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0})

    async def _change_memory(self, http: HTTPRequest, change: Callable[[set[str]], None]) -> Response:
        tags = set(parse_json(await http.body()).get("tags") or MEMORY_TAGS)
        if not tags <= MEMORY_TAGS:
            raise BadRequest(f"tags must be among {sorted(MEMORY_TAGS)}, got {sorted(tags - MEMORY_TAGS)}.")
        try:
            await self._run(lambda: change(tags))
        except EngineUnavailable as error:
            raise BadRequest(str(error)) from error
        return json_response({"success": True})

    async def _run(self, function: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._engine.call(function))
