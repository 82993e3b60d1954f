"""What the requests of one rollout share, and how those that are no longer wanted are told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import anyio

from slime.rollout.tokenizer import tokenizer_of
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

SamplingParams = dict[str, Any]
Tasks = set["asyncio.Task[Any]"]


class RolloutFailed(RuntimeError):
    """More samples failed than --max-failed-fraction allows, or the filter dropped more groups than allowed."""


class GenerateState:
    """What the requests of one rollout share: tokenizer, sampling parameters, the count of failures and the first.

    pendings: tasks of `generate_and_rm_group` that `abort` shall end, each with its place among the groups. is_aborted:
    it has been called; from then on no request and no reward is started. generating, scoring: tasks that do that.
    """

    def __init__(self, args: Any, rollout_id: int | None = None) -> None:
        self.args = args
        self.rollout_id = rollout_id
        self.tokenizer = tokenizer_of(args)
        self.sampling_params: SamplingParams = {
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
            "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "stop": args.rollout_stop,
            "stop_token_ids": args.rollout_stop_token_ids,
            "skip_special_tokens": args.rollout_skip_special_tokens,
        }
        self.num_failed = 0
        self.first_failure = ""
        self.pendings: dict[asyncio.Task[list[Sample]], int] = {}
        self.is_aborted = False
        self.generating: Tasks = set()
        self.scoring: Tasks = set()
        self.num_lost_tokens = 0

    @property
    def semaphore(self) -> anyio.Semaphore:
        """The bound on requests in flight: one for all that run in this event loop, evaluation sets included."""
        num_engines = max(1, self.args.num_engines)
        return _semaphore(self.args.sglang_server_concurrency * num_engines, asyncio.get_running_loop())

    def count_failure(self, sample: Sample) -> None:
        """Count a FAILED sample; the reason of the first is kept."""
        reason = sample.metadata.get("failure", "no reason given")
        self.num_failed += 1
        self.first_failure = self.first_failure or reason
        logger.warning("sample %s failed: %s", sample.index, reason)

    @contextlib.contextmanager
    def interruptible(self, stage: Tasks) -> Iterator[None]:
        """A block that `abort` may end early by cancelling the tasks of `stage`; what follows the block then runs."""
        task = asyncio.current_task()
        assert task is not None
        stage.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.is_aborted:
                raise
            task.uncancel()
        finally:
            stage.discard(task)


@functools.lru_cache(maxsize=8)
def _semaphore(bound: int, loop: asyncio.AbstractEventLoop) -> anyio.Semaphore:
    return anyio.Semaphore(bound, fast_acquire=True)
