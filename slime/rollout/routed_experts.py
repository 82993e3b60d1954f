"""Experts that an engine sampled with, for --use-rollout-routing-replay: asked for, and read from its answers.

Routers (sglang-router 0.3) drop what they do not know from a request, this among it. So requests go to engines
themselves: to that of the sample's session, or of its prompt, whose prefix it knows, unless others are much less busy.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import time
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime.config.model import experts_shape, read_model_config
from slime.rollout.engines import engine_urls
from slime.utils.http_utils import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, RETRIED_STATUS, HTTPError, post
from slime.utils.types import Sample

KNOWN_FOR_S = 5.0  # addresses of engines
RETRY_FOR_S = 300.0  # longer than the restart of an engine
MUCH_BUSIER = 10  # requests, as a router's --balance-abs-threshold

Experts = NDArray[np.int16]


class Engines:
    """The engines of the policy, and how many requests of this process each has."""

    def __init__(self) -> None:
        self._urls: list[str] = []
        self._asked_at = -KNOWN_FOR_S
        self._num_requests: dict[str, int] = {}

    async def post(self, args: Any, payload: dict[str, Any], *, key: str, headers: dict[str, str]) -> Any:
        """POST /generate to one of them, to another where that is lost. key: what shares a prefix. Raises HTTPError."""
        give_up_at, backoff_s, lost = time.monotonic() + RETRY_FOR_S, FIRST_BACKOFF_S, set[str]()
        while True:
            url = await self._choose(args, key, lost)
            self._num_requests[url] = self._num_requests.get(url, 0) + 1
            timeout_s = args.sglang_router_request_timeout_secs
            try:
                return await post(f"{url}/generate", payload, timeout_s=timeout_s, retry_for_s=0.0, headers=headers)
            except HTTPError as error:
                is_passing = error.status is None or error.status in RETRIED_STATUS
                if not is_passing or time.monotonic() + backoff_s > give_up_at:
                    raise
            finally:
                self._num_requests[url] -= 1
            lost.add(url)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _choose(self, args: Any, key: str, lost: set[str]) -> str:
        """Raises HTTPError where no engine is there within the time of a restart."""
        if time.monotonic() - self._asked_at > KNOWN_FOR_S or lost:
            await self._ask(args)
        urls = [url for url in self._urls if url not in lost] or self._urls
        preferred = urls[zlib.crc32(key.encode()) % len(urls)]
        idlest = min(urls, key=lambda url: self._num_requests.get(url, 0))
        num_more = self._num_requests.get(preferred, 0) - self._num_requests.get(idlest, 0)
        return idlest if num_more > MUCH_BUSIER else preferred

    async def _ask(self, args: Any) -> None:
        deadline = time.monotonic() + RETRY_FOR_S
        while not (urls := sorted(await engine_urls(args, only_healthy=True))):
            if time.monotonic() > deadline:
                raise HTTPError(f"the router named no healthy engine within {RETRY_FOR_S:g} s", None)
            await asyncio.sleep(LONGEST_BACKOFF_S)
        self._urls, self._asked_at = urls, time.monotonic()


@functools.lru_cache(maxsize=8)
def engines_of(router: tuple[str, int], loop: asyncio.AbstractEventLoop) -> Engines:
    """Those behind a router, as one event loop sees them."""
    return Engines()


async def generate_with_experts(
    args: Any, sample: Sample, payload: dict[str, Any], *, headers: dict[str, str]
) -> dict[str, Any]:
    """An engine's answer to the rest of `sample`, which tells of the experts that `sample` does not know yet."""
    engines = engines_of((args.sglang_router_ip, args.sglang_router_port), asyncio.get_running_loop())
    asked = {"return_routed_experts": True, "routed_experts_start_len": num_routed(sample)}
    key = str(sample.session_id or sample.group_index)
    answer: dict[str, Any] = await engines.post(args, payload | asked, key=key, headers=headers)
    return answer


def without_unrouted(answer: dict[str, Any]) -> dict[str, Any]:
    """`answer` without tokens where it was aborted while it waited: SGLang then does not tell of their experts."""
    meta_info = answer.get("meta_info") or {}
    is_aborted = (meta_info.get("finish_reason") or {}).get("type") == "abort"
    if not is_aborted or "routed_experts" in meta_info:
        return answer
    return answer | {"text": "", "meta_info": meta_info | {"output_token_logprobs": []}}


def num_routed(sample: Sample) -> int:
    """Tokens whose experts `sample` knows."""
    return 0 if sample.rollout_routed_experts is None else len(sample.rollout_routed_experts)


def read_experts(args: Any, sample: Sample, meta_info: dict[str, Any], num_new: int) -> Experts:
    """Experts of the tokens that `sample` does not know them of, of all but the last of `num_new` sampled ones.

    Raises ValueError, which ends the run, for an engine that does not tell, or of another number of tokens.
    """
    encoded = meta_info.get("routed_experts")
    if encoded is None:
        raise ValueError(
            "--use-rollout-routing-replay: an engine answered without routed_experts. It must be SGLang 0.5.14 or "
            "newer, or the embedded engine, started with --enable-return-routed-experts."
        )
    shape = experts_shape(_model_config(args.hf_checkpoint))
    assert shape is not None, "settings are checked"
    flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
    num_tokens = len(sample.tokens) + num_new - 1 - num_routed(sample)
    is_known = flat.size == 0 or (flat.min() >= 0 and flat.max() < shape.num_experts)
    if not is_known or flat.size != num_tokens * shape.num_layers * shape.top_k:
        raise ValueError(
            f"--use-rollout-routing-replay: an engine told of {flat.size} experts up to {flat.max(initial=0)}; "
            f"{num_tokens} tokens in {shape.num_layers} layers have {shape.top_k} each of {shape.num_experts}. Its "
            "model must be that of --hf-checkpoint."
        )
    return flat.reshape(num_tokens, shape.num_layers, shape.top_k).astype(np.int16)


@functools.lru_cache(maxsize=8)
def _model_config(directory: str) -> dict[str, Any]:
    return read_model_config(directory)
