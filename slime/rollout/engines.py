"""Where the engines of the policy are."""

from __future__ import annotations

import logging
from typing import Any

from slime.utils.http_utils import HTTPError, get

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # for one answer of router or engine
NOT_FOUND = 404


async def engine_urls(args: Any, *, only_healthy: bool = False) -> list[str]:
    """Addresses of the engines behind the router, or of the one engine that stands in its place."""
    router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    try:
        answer = await get(f"{router}/workers", timeout_s=ANSWER_S)
    except HTTPError as error:
        if error.status == NOT_FOUND:
            return [router]
        logger.warning("the router does not name its engines: %s", error)
        return []
    return [worker["url"] for worker in answer["workers"] if not only_healthy or worker.get("is_healthy", True)]
