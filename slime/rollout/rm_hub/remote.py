"""--rm-type remote_rm: asks the reward server at --rm-url."""

from __future__ import annotations

from functools import partial
from typing import Any

from slime.rollout.rm_hub.deadline import call_with_deadline
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def remote_rm(args: Any, sample: Sample) -> Any:
    """The server's JSON answer, a number or a dict, to {"prompt", "response", "label"}."""
    if args.rm_url is None:
        raise ValueError("--rm-type remote_rm needs --rm-url")
    payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
    ask = partial(post, args.rm_url, payload, timeout_s=args.rm_timeout_s, retry_for_s=args.rm_timeout_s)
    return await call_with_deadline(ask, name="remote_rm", sample_index=sample.index, timeout_s=args.rm_timeout_s)
