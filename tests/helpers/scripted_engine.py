"""A server that plays an engine which says what a test wants, for words that a random model never says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

from aiohttp import web

from slime.utils.async_utils import run
from slime.utils.http_utils import find_free_port

ABORTED = "aborted"  # the script's word for a turn that ends after one token
Script = Callable[[str], str]  # the text so far -> the next turn


class ScriptedEngine:
    """Answers /generate with the tokens of `script(text so far)` and the end of the turn; log-prob -0.5 each.

    stop: a string after which the turn ends as it is.
    """

    def __init__(self, tokenizer: Any, script: Script, stop: str | None) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.script = script
        self.inputs: list[list[int]] = []
        self.num_generated = 0  # tokens, of all answers

    async def generate(self, request: web.Request) -> web.Response:
        """One request of the protocol."""
        body = await request.json()
        input_ids = body["input_ids"]
        self.inputs.append(input_ids)
        text = self.script(self.tokenizer.decode(input_ids, skip_special_tokens=False))
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.stop is None or not text.endswith(self.stop):
            token_ids.append(self.tokenizer.eos_token_id)
        limit = body["sampling_params"]["max_new_tokens"]
        reason = {"type": "stop"} if len(token_ids) <= limit else {"type": "length"}
        if text == ABORTED:
            token_ids, reason = token_ids[:1], {"type": "abort"}
        token_ids = token_ids[:limit]
        self.num_generated += len(token_ids)
        meta_info = {
            "finish_reason": reason,
            "prompt_tokens": len(input_ids),
            "completion_tokens": len(token_ids),
            "cached_tokens": 0,
            "weight_version": "1",
            "output_token_logprobs": [[-0.5, token_id, None] for token_id in token_ids],
        }
        return web.json_response({"text": self.tokenizer.decode(token_ids), "meta_info": meta_info})


@contextmanager
def scripted_engine(
    tokenizer: Any, script: Script, *, stop: str | None = None
) -> Iterator[tuple[ScriptedEngine, list[str]]]:
    """The engine, and the flags that send requests to it as to a router."""
    engine = ScriptedEngine(tokenizer, script, stop)
    app = web.Application()
    app.router.add_post("/generate", engine.generate)
    runner = web.AppRunner(app)
    port = find_free_port()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    run(start())
    try:
        yield engine, ["--sglang-router-ip", "127.0.0.1", "--sglang-router-port", str(port)]
    finally:
        run(runner.cleanup())


def router_flags(url: str) -> list[str]:
    """Flags that send requests to `url`, as to a router."""
    parts = urlparse(url)
    return ["--sglang-router-ip", str(parts.hostname), "--sglang-router-port", str(parts.port)]
