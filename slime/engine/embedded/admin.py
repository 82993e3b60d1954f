"""Health, information, pausing, cache and metrics."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response

from slime.engine.embedded.args import ServerArgs
from slime.engine.embedded.engine import Engine, describe
from slime.engine.embedded.generation import Generator, Handler, Progress, error_body, json_response
from slime.engine.embedded.metrics import prometheus_text
from slime.engine.embedded.protocol import BadRequest, Generation, parse_json
from slime.engine.embedded.sampling_params import SamplingParams

HEALTH_TIMEOUT_S = 20.0


class Admin:
    """The handlers; each runs its work in the engine's thread, between two steps."""

    def __init__(self, engine: Engine, generator: Generator, args: ServerArgs) -> None:
        self._engine, self._generator, self._args = engine, generator, args
        self._started = time.time()

    def reads(self) -> dict[str, Handler]:
        """Handlers of GET, under their paths."""
        return {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_server_info": self.server_info,
            "/get_load": self.get_load,
            "/metrics": self.metrics,
        }

    def writes(self) -> dict[str, Handler]:
        """Handlers of POST, under their paths."""
        return {
            "/abort_request": self.abort_request,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/flush_cache": self.flush_cache,
        }

    # reads

    async def health(self, _: HTTPRequest) -> Response:
        """200 unless the engine's thread is stuck."""
        self._engine.check_alive(time.monotonic())
        return Response(status_code=200)

    async def health_generate(self, http: HTTPRequest) -> Response:
        """200 if a token can be generated now, or others are being generated."""
        self._engine.check_alive(time.monotonic())
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

    async def metrics(self, _: HTTPRequest) -> Response:
        """The same numbers for Prometheus."""
        return PlainTextResponse(prometheus_text(self._engine), media_type="text/plain; version=0.0.4")

    # generation

    async def abort_request(self, http: HTTPRequest) -> Response:
        """Ends a request, or all; they answer with what they have."""
        body = parse_json(await http.body())
        rid, abort_all = body.get("rid") or "", bool(body.get("abort_all"))
        if not rid and not abort_all:
            raise BadRequest("abort_request needs a rid, or abort_all.")
        await self._engine.run(lambda: self._engine.abort(rid, all_requests=abort_all))
        return Response(status_code=200)

    async def pause_generation(self, http: HTTPRequest) -> Response:
        """Stops generation; new requests queue."""
        mode = parse_json(await http.body()).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode must be abort, retract or in_place, got {mode!r}.")
        await self._engine.run(lambda: self._engine.pause(mode))
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, _: HTTPRequest) -> Response:
        """Lets generation go on."""
        await self._engine.run(self._engine.resume)
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, _: HTTPRequest) -> Response:
        """Forgets known prefixes."""
        if await self._engine.run(self._engine.flush_cache):
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Cache not flushed: requests are running or waiting.\n", status_code=400)
